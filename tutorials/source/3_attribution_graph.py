# %% [markdown]
# # 3. Why does it say “Israel”? An attribution graph
#
# After “And he said unto the children of”, the bundled model's most likely next token is “ Israel”. Which words of the
# prompt lead there, and through which steps?
#
# A transcoder reads the input of an MLP and predicts its output, so each of its latents is a step of computation. An
# attribution graph says what these steps add to each other, from the tokens up to the logits.

# %%
REAL = False  # True: Gemma 2 2B. Accept its licence on its page, `hf auth login`, and have 10 GB of memory.
MODEL, LAYERS = ("gemma-2-2b", [4, 8, 12, 16, 20, 24]) if REAL else ("bundled", "all")
L0 = "closest:100" if REAL else "canonical"  # transcoders of Gemma 2 2B have no canonical L0
PROMPT = "The capital of France is" if REAL else "And he said unto the children of"

# %%
# %matplotlib inline
import gemma_scope_tl as gs
from gemma_scope_tl.attributions.head_loadings import head_loadings
from gemma_scope_tl.attributions.measured import measured_effects
from gemma_scope_tl.viz.figures import new_figure
from gemma_scope_tl.viz.graph_figure import draw_graph

model = gs.load_model(MODEL)
rows = gs.list_saes(model=MODEL, site="transcoder")
width = rows.sort_values("d_sae")["width"].iloc[0]
transcoders = list(gs.load_suite(MODEL, "transcoder", layers=LAYERS, width=width, l0=L0).values())
layer_of = {transcoder.layer: transcoder for transcoder in transcoders}
print(f"{len(transcoders)} transcoders of {width} latents")
likely = model(model.to_tokens(PROMPT))[0, -1].softmax(-1).topk(4)
for probability, token in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
    print(f"{probability:.2f} {model.tokenizer.decode([token])!r}")

# %% [markdown]
# ## The graph
#
# Nodes are tokens, active latents, errors (what a transcoder misses), and the most likely logits. The weight of an edge
# is what its source adds to its target: to the input of a latent before the threshold, or to a logit minus the mean of
# all logits. For that, attention patterns and the scales of norms are held constant, and MLPs are replaced by their
# transcoders, latents and errors. Everything else in the model is linear, so the edges into a node add up to its value,
# which `checks` shows.

# %%
graph = gs.attribution_graph(model, PROMPT, transcoders, logits=4)
print(f"{len(graph):,} nodes, {graph.weights.nnz:,} edges")
graph.checks[["value", "sum", "missing_share"]].head(4).round(6)

# %% [markdown]
# ## Prune
#
# Few nodes matter for the logits. Influence follows all paths from a node up to the logits; `pruned` keeps the nodes,
# and between them the edges, with a given share of it.

# %%
small = graph.pruned(node_threshold=0.6, edge_threshold=0.9)
print(f"{len(small)} nodes, {small.weights.nnz} edges are left")
word = dict(enumerate(small.tokens))
ranked = small.nodes.assign(token=small.nodes["position"].map(word)).sort_values("influence", ascending=False)
ranked.query("kind != 'logit'")[["node_id", "kind", "token", "activation", "influence"]].head(8).round(3)

# %%
figure, (ax,) = new_figure(1, height=5.5)
draw_graph(ax, small, PROMPT)
figure

# %% [markdown]
# Squares are tokens, circles are latents with their number, stars are logits. Red edges are positive and blue ones
# negative; larger nodes have more influence. All latents that are left are at the last token. The errors are gone: at
# this share of influence, the latents alone carry the prediction.
#
# ## Read it
#
# Begin at the end: what adds most to the logit of the first choice? And what do these latents promote?

# %%
answer = graph.nodes.query("kind == 'logit'")["node_id"].iloc[0]
edges = small.edges()
edges[edges["target"] == answer].head(6).round(2)


# %%
def promoted(node_id: str) -> list[str]:
    """Tokens whose logits a latent raises."""
    node = graph.nodes.set_index("node_id").loc[node_id]
    table = gs.top_tokens(model, layer_of[int(node["layer"])], int(node["latent"]), k=5)
    return table.query("kind == 'promoted'")["token"].tolist()


latents = ranked.query("kind == 'latent'")["node_id"].tolist()
into = edges[(edges["target"] == answer) & edges["source"].isin(latents)]
for node_id in into["source"].head(4):
    print(node_id, promoted(node_id))

# %% [markdown]
# The strongest one promotes names of one people. One step further back: what activates it?

# %%
key = into["source"].iloc[0]
edges[edges["target"] == key].head(6).round(2)

# %% [markdown]
# Latents of earlier layers at the same token, “ of”, and the token “ children” at the position before. An edge from
# another position can only pass attention; `head_loadings` says which heads carry it. What bypasses them has no layer.

# %%
tokens = graph.nodes.query("kind == 'embedding'")["node_id"]
before = tokens.iloc[-2]
heads = head_loadings(model, graph, transcoders, [(before, key)])
print(f"edge {before} -> {key}: {heads['loading'].sum():.2f}")
heads.sort_values("loading", key=abs, ascending=False).head(4)[["layer", "head", "loading"]].round(3)

# %% [markdown]
# ## Group
#
# The latents of earlier layers at “ of” have edges to it, and the word “ of” itself activates them most: together they
# are one step, “the last word is *of*”. Supernodes gather latents and give the group a name; the figure rings them.

# %%
by_id = graph.nodes.set_index("node_id")
early = [node for node in latents if by_id.loc[node, "layer"] < by_id.loc[key, "layer"]]
grouped = small.grouped("the last word", early).grouped("what it promotes", [key])
figure, (ax,) = new_figure(1, height=5.5)
draw_graph(ax, grouped, "the same graph, grouped")
figure

# %% [markdown]
# ## Test two edges
#
# A graph is a hypothesis until something is changed. `measured_effects` sets a latent to zero and measures what becomes
# of others, in two ways:
#
# - `frozen`: with patterns, norms and all other nodes held, the change must be the edge exactly, with its sign reversed.
# - `model`: the latent is removed in the model itself, and everything behind it is computed anew. Here the prediction
#   sums over all paths, and the measurement shows how far the frozen picture is true.
#
# The first edge leads to the latent found above.

# %%
first = edges[(edges["target"] == key) & edges["source"].isin(latents)]["source"].iloc[0]
effects = measured_effects(model, graph, transcoders, sources=[first, key], targets=len(graph))
shown = ["measured_in", "source", "target", "predicted", "measured"]
effects[(effects["source"] == first) & (effects["target"] == key)][shown].round(2)

# %% [markdown]
# The second leads from there to the logits of the two most likely tokens. In the model, every single logit is wrong by
# about as much: without the latent the residual stream is shorter, and the last norm scales up all that is left. What
# decides between two tokens is the difference of their logits, which the graph predicts well.

# %%
second = graph.nodes.query("kind == 'logit'")["node_id"].iloc[1]
logits = effects[(effects["source"] == key) & effects["target"].isin([answer, second])].set_index(
    ["measured_in", "target"]
)
both = logits[["predicted", "measured"]].unstack("target")
for place in both.index:
    for what in ("predicted", "measured"):
        one, other = both.loc[place, (what, answer)], both.loc[place, (what, second)]
        print(f"{place:6} {what:9}: {one:+.2f} and {other:+.2f}, difference {one - other:+.2f}")

# %% [markdown]
# And the model's words, without the latent at the last token:

# %%
sae = layer_of[int(by_id.loc[key, "layer"])]
latent = int(by_id.loc[key, "latent"])
with gs.splice(model, sae, error_term=True):
    hook = gs.ablate(sae, latent, positions=-1, on="features")
    without = model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=[hook])[0, -1].softmax(-1)
token = int(by_id.loc[answer, "token_id"])
name = model.tokenizer.decode([token])
print(f"probability of {name!r}: {likely.values[0]:.2f}, without latent {latent}: {without[token]:.2f}")

# %% [markdown]
# ## The page
#
# The same graph to click through, with examples of each latent, in a file that opens in any browser, and as JSON for
# circuit-tracer's viewer and Neuronpedia:

# %%
from gemma_scope_tl.attributions.graph_json import write_graph
from gemma_scope_tl.viz.graph_page import write_graph_page

write_graph_page(graph, "graph.html")
write_graph(small, "graph.json")

# %% [markdown]
# ## Exercises
#
# 1. The graph says that “ children” activates the latent at “ of”. Does the latent need this word? Write down what you
#    expect, then replace it (“ people”, “ house”, “ land”) and compare the latent's activation with `gs.features`. What
#    does an edge say, and what does it not say?
# 2. Transcoders leave attention whole. Add SAEs of the heads, `gs.load_sae(MODEL, "att", layer)` for every layer, to
#    `transcoders`, and make the graph again. Which nodes now stand between “ children” and the logits? Test one of
#    their edges as above, and compare the prompts of the first exercise.
