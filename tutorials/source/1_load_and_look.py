# %% [markdown]
# # 1. Load and look
#
# This tutorial follows the steps of Gemma Scope's own tutorial: tokens, activations, an SAE, reconstruction, L0, the
# special case of BOS, the strongest latents, and the page of a latent. It runs offline on a small Gemma 2 that comes
# with the package; the next cell switches to Gemma 2 2B. The documentation has a glossary of the terms.

# %%
REAL = False  # True: Gemma 2 2B. Accept its licence on its page, `hf auth login`, and have 10 GB of memory.
MODEL, LAYER, WIDTH = ("gemma-2-2b", 20, "16k") if REAL else ("bundled", 2, "1k")

# %%
# %matplotlib inline
import pandas as pd
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.viz.figures import latent_heatmap, new_figure

torch.set_grad_enabled(False)
torch.manual_seed(0)
model = gs.load_model(MODEL)
print(f"{model.dims.n_layers} layers, d_model {model.dims.d_model}")
print("defects of the installed libraries that were worked around:", *model.fixes, sep="\n  ")

# %% [markdown]
# ## Tokens and text
#
# `model` is a TransformerLens model, with all of its methods. `to_tokens` prepends BOS.

# %%
SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form."
tokens = model.to_tokens(SENTENCE)
names = [model.tokenizer.decode([int(token)]) for token in tokens[0]]
print(tokens.shape, names[:8])
print(model.generate("In the beginning", max_new_tokens=20, temperature=0.0))

# %% [markdown]
# ## The available SAEs
#
# The table has one row per SAE. `canonical` marks the SAE that is loaded if no L0 is given. In Gemma Scope's releases,
# it is the one whose L0 is nearest to 100 among those of a site, layer and width; in the bundled suite, the one in the
# middle.

# %%
gs.list_saes(model=MODEL, layer=LAYER, width=WIDTH)[["release", "id", "site", "l0", "canonical"]]

# %%
sae = gs.load_sae(MODEL, "res", LAYER, WIDTH)
print(f"L0 in the registry: {sae.row.l0:g}; reads {sae.cfg.metadata.hook_name}")
for name, parameter in sae.named_parameters():
    print(f"{name:10} {list(parameter.shape)}")
print("lengths of decoder rows:", sae.W_dec.norm(dim=-1).min().item(), "to", sae.W_dec.norm(dim=-1).max().item())

# %% [markdown]
# ## Activations, latents, reconstruction
#
# `run_with_cache` returns the residual stream after the layer. The hook names of both TransformerLens backends work.

# %%
_, cache = model.run_with_cache(tokens)
x = cache[f"blocks.{LAYER}.hook_resid_post"]
f = sae.encode(x)
x_hat = sae.decode(f)
print("activations", list(x.shape), "latents", list(f.shape), "reconstruction", list(x_hat.shape))

# %% [markdown]
# The explained variance (1 - FVU) and the mean L0 exclude BOS, which is the first token.

# %%
rest, rest_hat = x[:, 1:], x_hat[:, 1:]
explained = 1 - (rest - rest_hat).square().mean() / (rest - rest.mean((0, 1))).square().mean()
l0 = (f > 0).sum(-1)[0]
print(f"explained variance {explained:.3f}, mean L0 {l0[1:].float().mean():.1f}")
pd.DataFrame({"token": names, "norm": x[0].norm(dim=-1).round(decimals=1).tolist(), "active latents": l0.tolist()})

# %% [markdown]
# ## BOS is a special case
#
# Gemma Scope was not trained on BOS. On Gemma 2 2B, the norm of its residual stream is far larger than that of any
# other token, and thousands of latents are active there, so a single BOS distorts every mean. (The effect is smaller in
# the bundled model.) By default, this package excludes BOS, EOS and padding from tables, splices, metrics and
# interventions.

# %%
with_bos = gs.features(model, SENTENCE, sae, exclude_special_tokens=False)
without = gs.features(model, SENTENCE, sae)
print(
    "active latents at BOS:",
    int((with_bos["position"] == 0).sum()),
    "- in the table by default:",
    int((without["position"] == 0).sum()),
)

# %% [markdown]
# ## Which latents are active where
#
# The table shows the strongest latent of each token. A latent that is the strongest almost everywhere is dense: every
# suite has some of these, and they are hard to interpret by themselves.

# %%
gs.features(model, SENTENCE, sae, top=1)[["position", "token", "latent", "activation"]]

# %%
figure, (ax,) = new_figure(1)
latent_heatmap(ax, without, names, f"residual stream after layer {LAYER}: the ten strongest latents")
figure

# %% [markdown]
# ## One latent
#
# Among the latents that are active on at most two tokens of the sentence, this cell takes the one with the largest
# activation. `top_tokens` multiplies its decoder row by the unembedding, and lists the tokens with the largest and
# smallest result.

# %%
counts = without.groupby("latent")["activation"].agg(["size", "max"])
latent = int(counts[counts["size"] <= 2]["max"].idxmax())
print("latent", latent)
gs.top_tokens(model, sae, latent, k=5).pivot(index="rank", columns="kind", values="token")

# %% [markdown]
# The page of a latent shows the texts on which it is most active, how often it is active, which tokens it promotes, and
# similar latents. For a released SAE, `sae.row.neuronpedia` is the SAE's id on Neuronpedia, which has a page for each
# latent.

# %%
gs.feature_page(model, sae, latent, rows=32, examples=6)
