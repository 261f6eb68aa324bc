# %% [markdown]
# # 2. Splice, ablate, steer
#
# An SAE inside the forward pass: what its reconstruction costs, what a single latent does, and text with a latent turned
# up.

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
# ## What a splice costs
#
# The SAE's output takes the activation's place. With the error term, what the SAE misses is added, and the pass is the
# model's own.

# %%
clean = model(tokens, return_type="loss").item()
spliced = model.run_with_saes(tokens, saes=[sae], return_type="loss").item()
exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True, return_type="loss").item()
print(f"loss {clean:.4f}, spliced {spliced:.4f}, with the error term {exact:.4f}")

# %% [markdown]
# Several at once, and a `with` block in which everything runs through them. Afterwards the model is as it was.

# %%
several = [gs.load_sae(MODEL, site, LAYER, WIDTH) for site in ("res", "mlp", "att")]
with gs.splice(model, several):
    print("through three SAEs:", round(model(tokens, return_type="loss").item(), 4))
print("after the block the same bits:", model(tokens, return_type="loss").item() == clean)

# %% [markdown]
# The latents of a pass are in the cache, under SAELens's keys.

# %%
_, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
key = f"blocks.{LAYER}.hook_resid_post.hook_sae_acts_post"
print(key, list(cache[key].shape), "active at the last token:", int((cache[key][0, -1] > 0).sum()))

# %% [markdown]
# ## Ablate
#
# `gs.ablate` gives a hook name and a hook, for `run_with_hooks` of a plain model: the latent's part is taken out of the
# activation, and nothing else changes. Which of the latents at the last token does the likeliest next token need most?

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
# The same edit on the features of a spliced SAE: with the error term the two agree.

# %%
latent = int(strongest["latent"].iloc[0])
plain = model.run_with_hooks(tokens, fwd_hooks=[gs.ablate(sae, latent)])
with gs.splice(model, sae, error_term=True):
    on_features = model.run_with_hooks(tokens, fwd_hooks=[gs.ablate(sae, latent, on="features")])
print("largest difference of the logits:", f"{(plain - on_features).abs().max().item():.1e}")

# %% [markdown]
# ## Steer
#
# Add a latent's decoder row at every position of the prompt and of what is generated. Rows have length 1, so the scale is
# the length that is added. `unit="norm"` counts in lengths of the activation itself, which compares layers and models.
# First a latent that the tokens show to be specific. Too much of it breaks the text, as in the last row.

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
# `clamp` sets a latent to a value, `scale` multiplies it. All take several latents and positions, which count in the
# whole text, also while generating with a cache.

# %%
torch.manual_seed(0)
with model.hooks(
    [gs.clamp(sae, latent, 20.0, positions=slice(3, None)), gs.scale(sae, int(strongest["latent"].iloc[1]), 0.0)]
):
    print(model.generate("The king said", max_new_tokens=20, temperature=0.7, top_k=40))
