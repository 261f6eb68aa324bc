# %% [markdown]
# # 3. A small circuit with transcoders
#
# A transcoder reads what an MLP reads and predicts what it writes, so a latent of it is a step of computation. Which
# latents make the next token, and which drive which?

# %%
REAL = False  # True: Gemma 2 2B. Accept its licence on its page, `hf auth login`, and have 10 GB of memory.
MODEL, LAYERS = ("gemma-2-2b", [4, 8, 12, 16, 20, 24]) if REAL else ("bundled", "all")
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
transcoders = list(gs.load_suite(MODEL, "transcoder", layers=LAYERS, width=width).values())
print(
    f"{len(transcoders)} transcoders of {width} latents, from layer {transcoders[0].layer} to {transcoders[-1].layer}"
)

# %% [markdown]
# ## The question
#
# A metric turns logits into one number: here the logit of the likeliest next token minus that of the second.

# %%
first, second = model(model.to_tokens(PROMPT))[0, -1].topk(2).indices.tolist()
metric = logit_difference(first, second)
print(f"{PROMPT!r}: {model.tokenizer.decode([first])!r} against {model.tokenizer.decode([second])!r}")

# %% [markdown]
# ## What each latent adds
#
# Activation times gradient, in one forward and one backward pass for all transcoders. `error` is what a transcoder
# misses at a token, `unspliced` the whole output at BOS.

# %%
table = gs.attribute(model, PROMPT, transcoders, metric)
print(f"metric {table.attrs['metric']:.3f}")
latents = table[table["kind"] == "latent"]
latents.head(10)[["layer", "position", "token", "latent", "activation", "attribution"]].round(3)

# %% [markdown]
# Is that true? Set latents to zero, one at a time, and measure. To first order the change is minus the attribution.

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
# Nodes are the strongest latents and errors, edges their direct effects: gradients stop at every site that has a
# transcoder, so an edge does not run through a site between.

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
# What do the strongest latents write?

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
