# %% [markdown]
# # 1. Load and look
#
# The steps of Gemma Scope's own tutorial: tokens, activations, an SAE, reconstruction, L0, the trap at BOS, the
# strongest latents, a latent's page. It runs offline on a small Gemma 2 that comes with the package; the next cell
# switches to the real Gemma 2 2B.

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
# `model` is a TransformerLens model, with all of its methods. `to_tokens` puts BOS in front.

# %%
SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form."
tokens = model.to_tokens(SENTENCE)
names = [model.tokenizer.decode([int(token)]) for token in tokens[0]]
print(tokens.shape, names[:8])
print(model.generate("In the beginning", max_new_tokens=20, temperature=0.0))

# %% [markdown]
# ## Which SAEs are there
#
# A row for each SAE. `canonical` marks the one of a site, layer and width whose L0 is nearest to 100.

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
# `run_with_cache` gives the residual stream after the layer. Either backend's hook name works.

# %%
_, cache = model.run_with_cache(tokens)
x = cache[f"blocks.{LAYER}.hook_resid_post"]
f = sae.encode(x)
x_hat = sae.decode(f)
print("activations", list(x.shape), "latents", list(f.shape), "reconstruction", list(x_hat.shape))

# %% [markdown]
# Explained variance leaves BOS out. So does the L0.

# %%
rest, rest_hat = x[:, 1:], x_hat[:, 1:]
explained = 1 - (rest - rest_hat).square().mean() / (rest - rest.mean((0, 1))).square().mean()
l0 = (f > 0).sum(-1)[0]
print(f"explained variance {explained:.3f}, mean L0 {l0[1:].float().mean():.1f}")
pd.DataFrame({"token": names, "norm": x[0].norm(dim=-1).round(decimals=1).tolist(), "active latents": l0.tolist()})

# %% [markdown]
# ## The trap at BOS
#
# Gemma Scope was not trained on BOS. On Gemma 2 2B its residual stream is far longer than any other token's, and
# thousands of latents fire there: one BOS spoils every mean. (The bundled model's BOS is tamer.) This package leaves BOS, EOS and padding alone unless it is
# told otherwise, in tables, splices, metrics and interventions.

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
# ## Which latents fire where
#
# The strongest latent of each token. One that is first almost everywhere is a dense latent: every suite has some, and they
# mean little by themselves.

# %%
gs.features(model, SENTENCE, sae, top=1)[["position", "token", "latent", "activation"]]

# %%
figure, (ax,) = new_figure(1)
latent_heatmap(ax, without, names, f"residual stream after layer {LAYER}: the ten strongest latents")
figure

# %% [markdown]
# ## One latent
#
# The one that fires strongest among those that fire on at most two tokens of the sentence. `top_tokens` reads its decoder
# row through the unembedding.

# %%
counts = without.groupby("latent")["activation"].agg(["size", "max"])
latent = int(counts[counts["size"] <= 2]["max"].idxmax())
print("latent", latent)
gs.top_tokens(model, sae, latent, k=5).pivot(index="rank", columns="kind", values="token")

# %% [markdown]
# Its page: the texts on which it fires most, how often it fires, what it promotes, and similar latents. For a released
# SAE, `sae.row.neuronpedia` names the set of dashboards on Neuronpedia.

# %%
gs.feature_page(model, sae, latent, rows=32, examples=6)
