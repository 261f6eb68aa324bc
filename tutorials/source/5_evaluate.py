# %% [markdown]
# # 5. Evaluate, and read the figures
#
# The paper's metrics on held-out text: of the two SAEs of tutorial 4, and of the bundled ones, which were trained for
# longer and on more.

# %%
# The run of tutorial 4. Where it is finished in this folder, it is read; else it trains now.
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
# L0: latents that fire on a token. FVU: the share of the variance that is missed. Delta loss: how much the loss rises
# with the SAE in the pass, in nats. Loss recovered: 1 when nothing is lost, 0 when it is as bad as a zero in its place.
# Each has a confidence interval from resampling the sequences. BOS, EOS and padding are left alone.

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
# Lower and further left is better. Compare at equal L0 only: any SAE reconstructs better with more latents. Delta loss
# and FVU need not agree between sites, since the model does not read all directions alike.

# %%
fidelity = sparsity_fidelity(model, [*mine, *bundled], tokens, progress=False)
fidelity_figure(fidelity)

# %% [markdown]
# ## Along the sequence
#
# Early tokens have little to say about their past and are cheap to reconstruct. Delta loss is noisy with few sequences.

# %%
here = [sae for sae in bundled if sae.layer == 2]
position_figure(binned_by_position(model, here, tokens, progress=False))

# %% [markdown]
# ## How often latents fire
#
# A peak far to the right is latents that fire on most tokens, one far to the left is latents that are nearly dead.

# %%
frequency_figure(firing_frequencies(model, [*mine, *here], tokens, progress=False, bins=30))

# %% [markdown]
# ## Kinds of text

# %%
domain_figure(by_domain(model, here, labelled_texts(), rows=3, progress=False))

# %% [markdown]
# On the command line: `gemma-scope eval --model gemma-2-2b --site res --layer 20 --width 16k --data
# monology/pile-uncopyrighted --out results.csv`, and `gemma-scope study fidelity | position | frequency | domains |
# precision | transfer`.
