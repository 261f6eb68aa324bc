# %% [markdown]
# # 3. A small circuit with transcoders
#
# A transcoder reads the input of an MLP and predicts its output, so each of its latents represents a step of
# computation. This tutorial shows which latents contribute to the prediction of the next token, and which latents
# affect which others.

# %%
REAL = False  # True: Gemma 2 2B. Accept its licence on its page, `hf auth login`, and have 10 GB of memory.
MODEL, LAYERS = ("gemma-2-2b", [4, 8, 12, 16, 20, 24]) if REAL else ("bundled", "all")
L0 = "closest:100" if REAL else "canonical"  # transcoders of Gemma 2 2B have no canonical L0
PROMPT = "The capital of France is" if REAL else "In the beginning God created the heaven and the"

# %%
# %matplotlib inline
import pandas as pd

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.viz.circuit_figure import draw_circuit
from gemma_scope_tl.viz.figures import new_figure

model = gs.load_model(MODEL)
rows = gs.list_saes(model=MODEL, site="transcoder")
width = rows.sort_values("d_sae")["width"].iloc[0]
transcoders = list(gs.load_suite(MODEL, "transcoder", layers=LAYERS, width=width, l0=L0).values())
print(
    f"{len(transcoders)} transcoders of {width} latents, from layer {transcoders[0].layer} to {transcoders[-1].layer}"
)

# %% [markdown]
# ## The metric
#
# A metric is a function from logits to one number: here, the logit of the most likely next token minus that of the
# second most likely.

# %%
first, second = model(model.to_tokens(PROMPT))[0, -1].topk(2).indices.tolist()
metric = logit_difference(first, second)
print(f"{PROMPT!r}: {model.tokenizer.decode([first])!r} against {model.tokenizer.decode([second])!r}")

# %% [markdown]
# ## The contribution of each latent
#
# The attribution of a latent is its activation times the gradient of the metric along its decoder row, computed in one
# forward and one backward pass for all transcoders. Rows of the kind `error` are for what a transcoder misses at a
# token, and rows of the kind `unspliced` for the whole output of the MLP at BOS.

# %%
table = gs.attribute(model, PROMPT, transcoders, metric)
print(f"metric {table.attrs['metric']:.3f}")
latents = table[table["kind"] == "latent"]
latents.head(10)[["layer", "position", "token", "latent", "activation", "attribution"]].round(3)

# %% [markdown]
# To check the attributions, set latents to zero, one at a time, and measure the change of the metric. To first order,
# it is minus the attribution.

# %%
sae = transcoders[-1]
mine = latents[latents["layer"] == sae.layer].head(30)
measured = ablation_effects(model, PROMPT, sae, metric, list(zip(mine["position"], mine["latent"], strict=True)))
print(
    f"layer {sae.layer}: correlation of attribution and measured loss of the metric over {len(mine)} latents:",
    f"{pd.Series(measured).mul(-1).corr(mine['attribution'].reset_index(drop=True)):.3f}",
)

# %% [markdown]
# ## The circuit
#
# Nodes are the latents and error terms with the strongest attributions, and edges are their direct effects: gradients
# stop at every place that has a transcoder, so the weight of an edge does not include paths through other transcoders.

# %%
circuit = gs.circuit(model, PROMPT, transcoders, metric, nodes=16, edges=30)
circuit.edges.head(8).round(3)

# %%
figure, (ax,) = new_figure(1, height=4.5)
draw_circuit(
    ax, circuit, f"what makes {model.tokenizer.decode([first])!r} rather than {model.tokenizer.decode([second])!r}"
)
figure

# %% [markdown]
# The tokens that the strongest latents promote:

# %%
best = circuit.nodes.query("kind == 'latent'").sort_values("attribution", key=abs, ascending=False).head(4)
layer_of = {transcoder.layer: transcoder for transcoder in transcoders}
for node in best.itertuples():
    promoted = (
        gs.top_tokens(model, layer_of[node.layer], int(node.latent), k=6).query("kind == 'promoted'")["token"].tolist()
    )
    print(
        f"layer {node.layer}, latent {int(node.latent)}, at {node.token!r}, {node.attribution:+.2f}: promotes {promoted}"
    )
