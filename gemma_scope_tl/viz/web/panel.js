// The panel: what is known of a node or a supernode, its edges by weight, and the tools to pin and to group it.

const FEW = 9;
const shownOf = { into: FEW, from: FEW };
const token = (text) => make("span", { class: "token" }, visible(text));

function facts(pairs) {
  const list = make("dl", { class: "facts" });
  for (const [name, value] of pairs) if (value !== null && value !== undefined && value !== "") list.append(make("dt", {}, name), make("dd", {}, value));
  return list;
}

function showPanel() {
  const body = byId("panel-body"), chosen = state.clicked;
  const parts = chosen === null ? overview() : chosen.group ? groupPanel(state.groups.find((g) => g.name === chosen.group)) : nodePanel(nodes[chosen.node]);
  body.replaceChildren(...parts.filter(Boolean));
  body.scrollTop = 0;
  byId("handle-text").textContent = chosen === null ? "Overview" : chosen.group ? `Supernode ${visible(chosen.group)}` : visible(describe(nodes[chosen.node]));
}

function nodePanel(node) {
  const at = make("span", {}, `${node.position}: `, token(node.word));
  const label = shownLabel(node);
  return [
    make("h2", {}, visible(node.title)),
    label && node.kind === "latent" ? make("p", {}, visible(label)) : null,
    facts([["token", at], ["kind", node.kind === "latent" ? kindOf(node) : null], ["coder", node.coder && make("code", {}, node.coder)],
      ["activation", node.activation === null ? null : figure(node.activation)],
      ["probability", node.probability === null ? null : percent(node.probability)],
      ["constants", node.constants ? signed(node.constants) : null],
      ["influence", node.kind === "logit" ? null : `${percent(node.influence)} of all`], ["node", make("code", {}, visible(node.id))]]),
    nodeTools(node),
    node.kind === "error" ? make("p", { class: "soft" }, "What the coder does not reconstruct at this token, or a part of the model without a coder. It is a source of edges only.") : null,
    ...promotedOf(node),
    ...edgeList("Edges into it", node.into, "into", sum(node.into.map((e) => Math.abs(graph.weight[e]))) || 1, graph.totals[node.i]),
    ...edgeList("Edges from it", node.from, "from", null, null),
    ...latentPage(node),
  ];
}

function nodeTools(node) {
  const pinned = state.pinned.has(node.i), group = groupOf(node.i);
  const choice = make("select", { id: "group-choice", "aria-label": "Supernode of this node" }, make("option", { value: "" }, "no supernode"));
  state.groups.forEach((one) => choice.append(make("option", { value: `=${one.name}` }, visible(one.name))));
  choice.append(make("option", { value: "+" }, "new supernode…"));
  choice.value = group ? `=${group.name}` : "";
  choice.addEventListener("change", () => {
    if (choice.value === "+") { startGroup([node.i]); return; }
    put(node.i, choice.value ? choice.value.slice(1) : null);
    refresh();
    const again = byId("group-choice");
    if (again) again.focus();
  });
  return make("div", { class: "row-tools" },
    make("button", { id: "pin", "aria-pressed": String(pinned), onclick: () => togglePin(node.i) }, pinned ? "Unpin" : "Pin"), choice,
    group ? make("button", { onclick: () => { select({ group: group.name }); } }, "Open supernode") : null);
}

// Rows of edges. `ends` are lists of [other end, weight], strongest first.
function edgeList(title, edges, side, whole, total) {
  if (!edges.length) return [];
  const other = side === "into" ? graph.source : graph.target;
  const ends = edges.map((e) => [nodes[other[e]], graph.weight[e]]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const list = rowsOfEnds(ends, side, whole === null ? null : total || whole);
  const left = total && whole < total * 0.999 ? make("p", { class: "soft" }, `${percent(1 - whole / total)} of what goes into it comes from nodes or edges that are not on this page.`) : null;
  return [make("h3", {}, `${title} (${edges.length})`), list, left];
}

function rowsOfEnds(ends, side, total) {
  const strongest = Math.abs(ends[0][1]) || 1, list = make("ul", { class: "list" }), most = shownOf[side];
  ends.slice(0, most).forEach(([end, weight]) => list.append(make("li", {}, endRow(end, weight, strongest, total))));
  if (ends.length > most) {
    list.append(make("li", {}, make("button", { class: "plain", onclick: () => { shownOf[side] = Infinity; showPanel(); shownOf[side] = FEW; } }, `Show all ${ends.length}`)));
  }
  return list;
}

function endRow(end, weight, strongest, total) {
  const isGroup = end.members !== undefined, index = isGroup ? null : end.i;
  const text = isGroup ? `⬚ ${visible(end.name)}` : visible(describe(end));
  const share = total ? ` · ${percent(Math.abs(weight) / total)}` : "";
  const bar = make("span", { class: "bar" });
  bar.style.width = `${Math.max(1, (Math.abs(weight) / strongest) * 100)}%`;
  const row = make("button", { class: `link ${weight < 0 ? "negative" : ""}`, title: text, onclick: () => select(isGroup ? { group: end.name } : { node: index }) },
    make("span", { class: "name" }, text), make("span", { class: `number ${weight < 0 ? "down" : "up"}` }, signed(weight), make("span", { class: "soft" }, share)), bar);
  if (!isGroup) {
    row.addEventListener("pointerenter", () => { if (now.visible[index]) { now.pointed = index; pointAt(index); } });
    row.addEventListener("pointerleave", () => pointAt(null));
  }
  return row;
}

// The latent's page: label and promoted tokens of each output first, examples and the rest behind the edges.
function promotedOf(node) {
  if (node.kind !== "latent") return [];
  if (!node.note) return [make("p", { class: "soft" }, data.notes_said)];
  return node.note.planes.length ? [make("h3", {}, "Promoted tokens"), planesOf(node.note.planes, "promoted")] : [];
}

function latentPage(node) {
  const note = node.note, parts = [];
  if (!note) return [];
  if (note.fired !== null) {
    const share = note.tokens ? note.fired / note.tokens : 0;
    parts.push(make("h3", {}, "Where it fires"), make("p", {}, note.fired ? `On ${counted(note.fired)} of ${counted(note.tokens)} tokens of the text looked at (${percent(share)}), at most with ${figure(note.maximum)}.` : `On none of the ${counted(note.tokens)} tokens of the text looked at.`));
  }
  for (const example of note.examples) parts.push(exampleOf(example, note.maximum));
  if (note.planes.length) parts.push(make("h3", {}, "Suppressed tokens"), planesOf(note.planes, "suppressed"));
  if (note.neuronpedia) parts.push(make("p", {}, make("a", { href: note.neuronpedia, target: "_blank", rel: "noopener noreferrer" }, "Dashboard on Neuronpedia"), note.neuronpedia_warning ? ` (${note.neuronpedia_warning})` : ""));
  return parts;
}

function planesOf(planes, side) {
  const row = (plane) => make("div", { class: "tokens" }, ...plane[side].map(([text, logit]) => { const one = token(text); one.title = `${signed(logit)} per unit of activation`; return one; }));
  if (planes.length === 1) return row(planes[0]);
  return make("div", { class: "scroll" }, make("table", { class: "planes" }, make("tbody", {}, ...planes.map((plane) => make("tr", {}, make("th", { scope: "row" }, `to L${plane.layer}`), make("td", {}, row(plane)))))));
}

function exampleOf(example, maximum) {
  const spans = example.tokens.map((text, k) => {
    const value = example.activations[k], span = make("span", { class: k === example.peak ? "peak" : "" }, visible(text));
    if (value > 0) {
      span.style.background = `color-mix(in srgb, var(--up) ${Math.round(12 + 48 * Math.min(1, value / (maximum || 1)))}%, transparent)`;
      span.title = figure(value);
    }
    return span;
  });
  return make("p", { class: "example" }, make("b", {}, `${figure(example.activations[example.peak])}  `), ...spans);
}

function groupPanel(group) {
  const members = new Set(group.members), into = sumOver(group.members, "into", members), from = sumOver(group.members, "from", members);
  const name = make("input", { type: "text", id: "group-name", value: group.name, "aria-label": "Name of the supernode", maxlength: 80 });
  name.addEventListener("change", () => {
    const wanted = name.value.trim();
    if (!wanted || wanted === group.name) { name.value = group.name; return; }
    const old = group.name;
    group.name = "";
    group.name = freeName(wanted);
    if (state.places[`group:${old}`]) { state.places[`group:${group.name}`] = state.places[`group:${old}`]; delete state.places[`group:${old}`]; }
    state.clicked = { group: group.name };
    refresh();
  });
  const list = make("ul", { class: "list" }, ...group.members.map((i) => make("li", {},
    make("button", { class: "link", onclick: () => select({ node: i }) }, make("span", { class: "name" }, visible(describe(nodes[i])))),
    make("button", { class: "plain", title: "Take out of the supernode", "aria-label": `Take ${nodes[i].title} out`, onclick: () => { put(i, null); refresh(); } }, "✕"))));
  return [make("h2", {}, "Supernode"), make("div", { class: "row-tools" }, name, make("button", { onclick: () => { state.groups = state.groups.filter((g) => g !== group); select(null); } }, "Dissolve")),
    make("h3", {}, `Nodes (${group.members.length})`), list,
    ...(into.length ? [make("h3", {}, `Edges into it, summed (${into.length})`), rowsOfEnds(into, "into", null)] : []),
    ...(from.length ? [make("h3", {}, `Edges from it, summed (${from.length})`), rowsOfEnds(from, "from", null)] : []),
    make("p", { class: "soft" }, "A sum of edges adds effects on the nodes of the supernode, or on those of another one. Edges within a supernode are left out.")];
}

// The edges of several nodes, summed by what is at the other end: a supernode or a node.
function sumOver(members, side, own) {
  const ends = new Map();
  for (const i of members) {
    for (const e of nodes[i][side]) {
      const far = side === "into" ? graph.source[e] : graph.target[e];
      if (own.has(far)) continue;
      const end = groupOf(far) || nodes[far];
      ends.set(end, (ends.get(end) || 0) + graph.weight[e]);
    }
  }
  return [...ends].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
}

function overview() {
  const logits = nodes.filter((n) => n.kind === "logit").sort((a, b) => b.probability - a.probability);
  const found = state.query ? [...now.found] : [];
  return [
    make("h2", {}, "Overview"),
    facts([["model", make("code", {}, data.model)], ["prompt", make("div", { class: "prompt", tabindex: "0" }, visible(data.text))], ["nodes", counted(data.counts.nodes)], ["edges", counted(data.counts.edges)]]),
    ...data.left_out.map((text) => make("p", { class: "warn" }, text)),
    data.checks ? make("p", { class: "soft" }, data.checks) : null,
    ...(state.query ? [make("h3", {}, `Found (${found.length})`), nodeList(found.slice(0, 60))] : []),
    ...(state.groups.length ? [make("div", { class: "row-tools" }, make("button", { onclick: copyGroups, title: "Lines for AttributionGraph.grouped" }, "Copy supernodes as Python"))] : []),
    make("h3", {}, "Next tokens"), nodeList(logits.map((n) => n.i), (n) => (n.probability === null ? "" : percent(n.probability))),
    ...(state.pinned.size ? [make("h3", {}, "Pinned"), nodeList([...state.pinned])] : []),
    make("h3", {}, "Most influential latents"),
    nodeList(nodes.filter((n) => n.kind === "latent").sort((a, b) => b.influence - a.influence).slice(0, 12).map((n) => n.i), (n) => percent(n.influence)),
  ];
}

async function copyGroups(event) {
  const lines = state.groups.map((g) => `graph = graph.grouped(${JSON.stringify(g.name)}, ${JSON.stringify(g.members.map((i) => nodes[i].id))})`);
  try { await navigator.clipboard.writeText(lines.join("\n")); event.target.textContent = "Copied"; } catch { event.target.replaceWith(make("pre", { class: "example" }, lines.join("\n"))); }
}

function nodeList(rows, number = () => "") {
  return make("ul", { class: "list" }, ...rows.map((i) => make("li", {}, make("button", { class: "link", title: describe(nodes[i]), onclick: () => select({ node: i }) },
    make("span", { class: "name" }, visible(describe(nodes[i])) + (now.visible[i] ? "" : " (below the threshold)")), make("span", { class: "number soft" }, number(nodes[i]))))));
}

function showAbout() {
  const keys = [["← →", "the next node of the row"], ["↑ ↓", "the nearest node of the next row"], ["Enter", "open the node"], ["P", "pin it, or unpin it"],
    ["G", "choose its supernode"], ["/", "search"], ["+ −", "zoom"], ["S", "graph or summary"], ["Esc", "close what is open"]];
  state.clicked = null;
  refresh();
  byId("panel-body").replaceChildren(
    make("h2", {}, "About this page"),
    make("p", {}, "Each mark is something that adds to the model's computation at a token: a latent of a coder, the error of a coder, a token's embedding, or the logit of a possible next token. An edge is the direct effect of one on another, with attention patterns and the denominators of norms held fixed. Edges into a node, with its constants, add up to its value before the threshold: constants are the sum of all bias terms, which say nothing of the prompt."),
    make("p", {}, "The influence of a node is the share of the logits' inputs that passes through it, with an edge weighed by its share of all that goes into its end. The sliders keep the nodes and edges with this much of all influence. Tokens, logits, pinned and grouped nodes always stay."),
    make("p", {}, "Drag a node onto another one or onto a supernode to group them; with a finger, hold it first. The summary shows supernodes and pinned nodes as boxes; its edges are sums. The link of the page holds thresholds, pinned nodes, supernodes and places of boxes."),
    make("h3", {}, "Keys in the graph"), make("dl", { class: "facts" }, ...keys.flatMap(([key, what]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, what)])),
    make("h3", {}, "How it was made"), make("pre", { class: "example" }, data.settings));
  openSheet(true);
  byId("handle-text").textContent = "About this page";
}
