# %% [markdown]
# # 6. Publish and contribute
#
# This tutorial turns the SAEs of tutorial 4 into a repository from which others can load them by name, with this
# package and with SAELens.

# %%
# The run of tutorial 4. Where it is finished in this folder, it is read; else it trains now.
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

# %%
import os
import subprocess
import sys
from pathlib import Path

from IPython.display import Markdown

import gemma_scope_tl as gs
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import as_tokens

trained = gs.train_suite(CONFIG, progress=False)
model = gs.load_model("bundled")
saes = [
    gs.JumpReLUSAE.from_folder(Path(CONFIG["output"]) / path, model="bundled", site="res", layer=2)
    for path in trained["path"]
]
metrics = gs.evaluate(model, saes, as_tokens(model, list(read_texts()), 256)[::24], progress=False)
metrics["l0"] = trained["l0"].to_numpy()  # by which the folders are named
metrics[["site", "layer", "d_sae", "l0", "fvu", "delta_loss"]].round(3)

# %% [markdown]
# ## A repository
#
# `About` holds what cannot be read from the files: the licence and the data. The recipe of each SAE is in `suite.json`,
# which training wrote, and goes from there into the model card. The card states which information is missing.

# %%
about = gs.About(
    "mit",
    description="Two small SAEs of the bundled model, from a tutorial.",
    data="The held-out text of gemma_scope_tl.",
    evaluated_on="The same text, so the metrics flatter.",
)
(repo,) = gs.export_suite(
    CONFIG["output"],
    "tutorial-saes",
    about,
    model="bundled",
    metrics=metrics,
    layout="both",
    canonical=True,
    progress=False,
)
for path in sorted(repo.rglob("*")):
    if path.is_file():
        print(path.as_posix())

# %%
Markdown((repo / "README.md").read_text().split("---", 2)[2])

# %% [markdown]
# ## The registry file
#
# The export also writes a registry file with one row per SAE. `gemma-scope registry check` compares it with the schema,
# with every other known release, and with the headers and hashes of the weights files; `--run 1` also runs one SAE and
# compares its L0.

# %%
print((repo / "tutorial-saes.yaml").read_text())

# %%
checked = subprocess.run(
    [sys.executable, "-m", "gemma_scope_tl.cli", "registry", "check", str(repo / "tutorial-saes.yaml"), "--run", "1"],
    capture_output=True,
    env={**os.environ, "FORCE_COLOR": "", "NO_COLOR": "1"},
    text=True,
)
print(checked.stdout)
assert checked.returncode == 0, checked.stderr

# %% [markdown]
# ## Load an SAE by name

# %%
gs.register_release(repo / "tutorial-saes.yaml")
row = gs.list_saes(release="tutorial-saes").iloc[0]
sae = gs.JumpReLUSAE.from_pretrained(row["release"], row["id"])
print(row["release"], row["id"], "->", sae.cfg.metadata.hook_name)

# %% [markdown]
# SAELens loads the second layout from disk, and after `gs.register_with_sae_lens()` it knows every release of the
# registry. The weights are identical.

# %%
import sae_lens

theirs = sae_lens.SAE.load_from_disk(str(repo / "sae_lens" / row["path"]))
ours = sae.state_dict()
print(type(theirs).__module__, all(bool((value == ours[name]).all()) for name, value in theirs.state_dict().items()))

# %% [markdown]
# ## Upload
#
# The folder is the content of the repository. `gemma-scope upload tutorial-saes my-name/tutorial-saes` checks
# everything and lists what would be sent. With `--yes`, it sends the files in one commit, to a private repository
# unless you pass `--public`, and writes a registry file that names the repository and the commit. Register this file,
# or contribute it to `pretrained_yaml/` by a pull request. In Python:
# `gs.upload_suite("tutorial-saes", "my-name/tutorial-saes", dry_run=True)`.
