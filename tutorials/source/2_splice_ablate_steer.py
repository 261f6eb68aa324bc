# %% [markdown]
# # 2. Splice, ablate, steer
#
# This tutorial puts an SAE into the forward pass. It measures how much the reconstruction changes the loss, ablates
# single latents, and generates text while a latent is steered.

# %%
REAL = False  # True: Gemma 2 2B. Accept its licence on its page, `hf auth login`, and have 10 GB of memory.
MODEL, LAYER, WIDTH = ("gemma-2-2b", 20, "16k") if REAL else ("bundled", 2, "1k")

# %%
import pandas as pd
import torch
from IPython.display import display

import gemma_scope_tl as gs

torch.set_grad_enabled(False)
model = gs.load_model(MODEL)
sae = gs.load_sae(MODEL, "res", LAYER, WIDTH)
PROMPT = "In the beginning God created the heaven and the"
tokens = model.to_tokens(PROMPT)

# %% [markdown]
# ## Splice
#
# In a splice, the reconstruction of the SAE replaces the activation, and the loss of the model rises: the increase is
# the delta loss. With the error term, what the reconstruction misses is added back, and the loss is that of the plain
# model.

# %%
clean = model(tokens, return_type="loss").item()
spliced = model.run_with_saes(tokens, saes=[sae], return_type="loss").item()
exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True, return_type="loss").item()
print(f"loss {clean:.4f}, spliced {spliced:.4f}, with the error term {exact:.4f}")

# %% [markdown]
# Several SAEs can be spliced at once, here for all passes in a `with` block. After the block, the model is unchanged.

# %%
several = [gs.load_sae(MODEL, site, LAYER, WIDTH) for site in ("res", "mlp", "att")]
with gs.splice(model, several):
    print("through three SAEs:", round(model(tokens, return_type="loss").item(), 4))
print("after the block the same bits:", model(tokens, return_type="loss").item() == clean)

# %% [markdown]
# The activations of the latents are in the cache, under the same keys as in SAELens.

# %%
_, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
key = f"blocks.{LAYER}.hook_resid_post.hook_sae_acts_post"
print(key, list(cache[key].shape), "active at the last token:", int((cache[key][0, -1] > 0).sum()))

# %% [markdown]
# ## Ablate
#
# `gs.ablate` returns a hook name and a hook, for `run_with_hooks` of a plain model. The hook subtracts the contribution
# of the latent from the activation and changes nothing else. The table shows how much the log probability of the most
# likely next token changes when one latent is ablated at the last token.

# %%
answer = int(model(tokens)[0, -1].argmax())
before = model(tokens)[0, -1].log_softmax(-1)[answer].item()
strongest = gs.features(model, PROMPT, sae).query("position == position.max()").head(8)
rows = []
for row in strongest.itertuples():
    logits = model.run_with_hooks(tokens, fwd_hooks=[gs.ablate(sae, row.latent, positions=-1)])
    rows.append(
        {
            "latent": row.latent,
            "activation": row.activation,
            "change of log p": logits[0, -1].log_softmax(-1)[answer].item() - before,
        }
    )
print(f"likeliest next token: {model.tokenizer.decode([answer])!r}, log p {before:.2f}")
pd.DataFrame(rows).sort_values("change of log p").round(3)

# %% [markdown]
# The same edit can be made on the latents of a spliced SAE. With the error term, both give the same logits.

# %%
latent = int(strongest["latent"].iloc[0])
plain = model.run_with_hooks(tokens, fwd_hooks=[gs.ablate(sae, latent)])
with gs.splice(model, sae, error_term=True):
    on_features = model.run_with_hooks(tokens, fwd_hooks=[gs.ablate(sae, latent, on="features")])
print("largest difference of the logits:", f"{(plain - on_features).abs().max().item():.1e}")

# %% [markdown]
# ## Steer
#
# Steering adds a latent's decoder row at every position, of the prompt and of the generated text. Decoder rows have
# norm 1, so by default the scale is the norm of the added vector. With `unit="norm"`, the scale is relative to the norm
# of the activation, so that it can be compared across layers and models. The next cell selects a latent that is active
# on few tokens. If the strength is too large, the generated text becomes meaningless, as in the last row of the table.

# %%
table = gs.features(model, "The king said unto the people, and the sea was calm.", sae)
counts = table.groupby("latent")["activation"].agg(["size", "max"])
latent = int(counts[counts["size"] <= 2]["max"].idxmax())
print("latent", latent, "fires on", table.loc[table["latent"] == latent, "token"].tolist())
print("promotes", gs.top_tokens(model, sae, latent, k=6).query("kind == 'promoted'")["token"].tolist())

# %%
rows = []
for strength in (0.0, 0.2, 0.4, 0.8):
    torch.manual_seed(0)
    with model.hooks([gs.steer(sae, latent, strength, unit="norm")]):
        out = model.generate(model.to_tokens("The"), max_new_tokens=24, temperature=0.7, top_k=40, return_type="tokens")
    rows.append({"strength, norms": strength, "continuation": model.tokenizer.decode(out[0, 1:])})
with pd.option_context("display.max_colwidth", None):
    display(pd.DataFrame(rows))

# %% [markdown]
# `clamp` sets a latent to a value, and `scale` multiplies it by a factor. All of these functions accept several latents
# and positions. Positions are counted in the whole text, also in generation with a cache.

# %%
torch.manual_seed(0)
with model.hooks(
    [gs.clamp(sae, latent, 20.0, positions=slice(3, None)), gs.scale(sae, int(strongest["latent"].iloc[1]), 0.0)]
):
    print(model.generate("The king said", max_new_tokens=20, temperature=0.7, top_k=40))
