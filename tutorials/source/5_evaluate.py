# %% [markdown]
# # 5. Evaluate, and read the figures
#
# This tutorial measures the paper's metrics on held-out text, for the two SAEs of tutorial 4 and for the bundled SAEs,
# which were trained for longer and on more text.

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
# %matplotlib inline
from pathlib import Path

import gemma_scope_tl as gs
from gemma_scope_tl.studies import binned_by_position, by_domain, firing_frequencies, labelled_texts, sparsity_fidelity
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import as_tokens
from gemma_scope_tl.viz.study_figures import domain_figure, fidelity_figure, frequency_figure, position_figure

trained = gs.train_suite(CONFIG, progress=False)
model = gs.load_model("bundled")
mine = [
    gs.JumpReLUSAE.from_folder(Path(CONFIG["output"]) / path, model="bundled", site="res", layer=2)
    for path in trained["path"]
]
rows = gs.list_saes(model="bundled", site="res", width="1k")
bundled = [gs.JumpReLUSAE.from_pretrained(row.release, row.id) for row in rows.itertuples()]
tokens = as_tokens(model, list(read_texts()), 256)[::12][:16]
print(f"{len(mine)} of mine, {len(bundled)} bundled, {tokens.numel():,} held-out tokens")

# %% [markdown]
# ## The metrics
#
# - L0: the mean number of active latents per token.
# - FVU: the fraction of the variance that the reconstruction does not explain.
# - Delta loss: the increase of the model's loss when the SAE is spliced, in nats.
# - Loss recovered: 1 if a splice does not change the loss, and 0 if it is as bad as replacing the activation by zero.
#
# Each has a confidence interval, computed by resampling the sequences. BOS, EOS and padding are excluded.

# %%
table = gs.evaluate(model, [*mine, *bundled], tokens, progress=False)
table["whose"] = ["mine"] * len(mine) + ["bundled"] * len(bundled)
columns = [
    "whose",
    "layer",
    "d_sae",
    "l0",
    "fvu",
    "delta_loss",
    "delta_loss_low",
    "delta_loss_high",
    "loss_recovered",
    "dead",
]
table[columns].round(3)

# %% [markdown]
# ## Sparsity and fidelity
#
# Points that are lower and further to the left are better. Compare SAEs at equal L0 only, because any SAE reconstructs
# better with more active latents. Delta loss and FVU may rank sites differently, because the model does not depend
# equally on all directions of an activation.

# %%
fidelity = sparsity_fidelity(model, [*mine, *bundled], tokens, progress=False)
fidelity_figure(fidelity)

# %% [markdown]
# ## Along the sequence
#
# Activations of early tokens contain little context and are easier to reconstruct. With few sequences, delta loss is
# noisy.

# %%
here = [sae for sae in bundled if sae.layer == 2]
position_figure(binned_by_position(model, here, tokens, progress=False))

# %% [markdown]
# ## How often latents are active
#
# A peak on the far right consists of latents that are active on most tokens, a peak on the far left of latents that are
# almost dead.

# %%
frequency_figure(firing_frequencies(model, [*mine, *here], tokens, progress=False, bins=30))

# %% [markdown]
# ## Kinds of text

# %%
domain_figure(by_domain(model, here, labelled_texts(), rows=3, progress=False))

# %% [markdown]
# On the command line:
#
# ```
# gemma-scope eval --model gemma-2-2b --site res --layer 20 --width 16k \
#   --data monology/pile-uncopyrighted --out results.csv
# ```
#
# The studies are `gemma-scope study fidelity`, `position`, `frequency`, `domains`, `precision` and `transfer`.
