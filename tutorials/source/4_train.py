# %% [markdown]
# # 4. Train your own suite
#
# Two small JumpReLU SAEs on one layer of the bundled model, in under a minute, with the recipe of the paper shortened for
# short runs. The same function, and the same keys, train all sites of Gemma 2 2B.

# %%
CONFIG = {
    "output": "my-suite",
    "model": {"name": "bundled", "device": "cpu"},
    "data": {"dataset": "bundled", "column": "text", "context": 256},
    "source": {"bucket_rows": 16384, "scale_rows": 16384, "batch_rows": 16},
    "steps": 150,
    "recipe": {"preset": "fast", "batch_size": 1024, "lr_warm_up_steps": 25, "l0_warm_up_steps": 50},
    "grid": [{"sites": ["res"], "layers": [2], "widths": [256], "target_l0s": [10, 30]}],
    "eval_batches": 8,
    "checkpoint_every": 100,
    "log_every": 10,
}

# %% [markdown]
# `preset: paper` is the paper's recipe for runs of a million steps; `fast` says in its docstring what it changes and
# why. For Gemma 2 2B start from `configs/gemma-2-2b-paper.yaml`: `gs.train_suite("configs/gemma-2-2b-paper.yaml",
# overrides=["only=[res/layer_12/*]"])`.
#
# ## What it will take
#
# Before anything runs: memory, disk and time, from the shapes and a second of measuring. (The times of your machine
# would stand here; they are left out so that this page stays the same.)

# %%
# %matplotlib inline
from pathlib import Path

import gemma_scope_tl as gs
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.recipe import FAST, PAPER
from gemma_scope_tl.viz.training_figures import training_curves

plan = plan_suite(CONFIG, measure=False)
plan.jobs[["place", "saes", "widths", "tokens", "steps", "parameters", "memory", "released"]]

# %%
print(f"{'':18}{'paper':>10}{'fast':>10}")
for name in ("lr", "batch_size", "l0_coefficient", "l0_warm_up_steps", "bandwidth", "init_threshold"):
    print(f"{name:18}{getattr(PAPER, name):>10g}{getattr(FAST, name):>10g}")

# %% [markdown]
# ## Train
#
# One stream of activations feeds all SAEs of the grid. Lambda is steered so that L0 comes to the target. Stop it whenever
# you like: the same call goes on from the last checkpoint and ends with the same bits; a finished run is returned at
# once.

# %%
trained = gs.train_suite(CONFIG, progress=False)
trained[["path", "l0", "fvu", "silent", "steps"]].round(3)

# %% [markdown]
# ## The curves
#
# The error falls, lambda finds the target, thresholds settle. With so few steps neither is done.

# %%
training_curves(Path(CONFIG["output"]) / "metrics.jsonl")

# %% [markdown]
# ## What was written
#
# Gemma Scope's layout: a `params.npz` for each SAE, folded for raw activations (appendix A), and a table.

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
