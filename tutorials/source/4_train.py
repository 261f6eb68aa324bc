# %% [markdown]
# # 4. Train your own suite
#
# This tutorial trains two small JumpReLU SAEs on one layer of the bundled model, in less than a minute, with the
# paper's recipe adapted to short runs. The same function, with the same keys, trains SAEs at all sites of Gemma 2 2B.

# %%
CONFIG = {
    "output": "tutorial-suite",
    "model": {"name": "bundled", "device": "cpu"},
    "data": {"dataset": "bundled", "column": "text", "context": 256},
    "source": {"bucket_rows": 16384, "scale_rows": 16384, "batch_rows": 16},
    "steps": 150,
    "recipe": {"preset": "fast", "batch_size": 1024},
    "grid": [{"sites": ["res"], "layers": [2], "widths": [256], "target_l0s": [10, 30]}],
    "eval_batches": 8,
    "checkpoint_every": 100,
    "log_every": 10,
}

# %% [markdown]
# `preset: paper` is the paper's recipe, for runs of a million steps. `preset: fast` is for short runs, and follows the
# place, width and target L0 of each SAE and the number of steps; its documentation explains what it changes and why.
# For Gemma 2 2B, start from a configuration that comes with the package:
# `gs.train_suite("gemma-2-2b-paper", overrides=["only=[res/layer_12/*]"])`.
#
# ## Plan
#
# `plan_suite` computes memory, disk space and time before anything runs, from the shapes and a measurement of about a
# second. (The measurement is switched off here, so that the output of this page does not depend on the machine.)

# %%
# %matplotlib inline
from pathlib import Path

import gemma_scope_tl as gs
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.recipe import PAPER
from gemma_scope_tl.training.recipe_table import planned_recipes
from gemma_scope_tl.viz.training_figures import training_curves

plan = plan_suite(CONFIG, measure=False)
plan.jobs[["place", "saes", "widths", "tokens", "steps", "parameters", "memory", "released"]]

# %% [markdown]
# The values of the recipe with which each SAE of this run will be trained, beside the paper's:

# %%
names = ["lr", "batch_size", "l0_coefficient", "l0_warm_up_steps", "bandwidth", "init_threshold"]
recipes = planned_recipes(CONFIG)[names].T
recipes.insert(0, "paper", [getattr(PAPER, name) for name in names])
recipes.map("{:g}".format)

# %% [markdown]
# ## Train
#
# All SAEs of the grid are trained on one stream of activations, and lambda is adjusted so that L0 approaches the
# target. You can stop the run at any time: the same call resumes from the last checkpoint, with bitwise identical
# results. For a finished run, it returns the results immediately.

# %%
trained = gs.train_suite(CONFIG, progress=False)
trained[["path", "l0", "fvu", "silent", "steps"]].round(3)

# %% [markdown]
# ## The curves
#
# The error decreases, lambda approaches the value that gives the target L0, and the thresholds converge. After so few
# steps, none of them has converged.

# %%
training_curves(Path(CONFIG["output"]) / "metrics.jsonl")

# %% [markdown]
# ## The output folder
#
# The folder has Gemma Scope's layout: one `params.npz` per SAE, whose weights are folded for raw activations (appendix
# A of the paper), and a table of the SAEs.

# %%
for path in sorted(Path(CONFIG["output"]).rglob("*")):
    if path.is_file() and path.suffix != ".parquet" and "tokens" not in path.parts:
        print(path.as_posix())

# %%
folder = Path(CONFIG["output"]) / trained["path"].iloc[-1]
sae = gs.JumpReLUSAE.from_folder(folder, model="bundled", site="res", layer=2)
model = gs.load_model("bundled")
print(
    "decoder rows:",
    round(sae.W_dec.norm(dim=-1).mean().item(), 4),
    "thresholds:",
    round(sae.threshold.median().item(), 3),
)
gs.features(model, "In the beginning God created the heaven and the earth.", sae, top=1)[
    ["token", "latent", "activation"]
].head(6)
