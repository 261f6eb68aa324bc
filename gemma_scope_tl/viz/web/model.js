// The graph of the page, from the data in it, and the state of the view with its link.

const byId = (name) => document.getElementById(name);
const data = JSON.parse(byId("data").textContent);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function draw(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const BANDS = { att: "att", transcoder: "mlp", clt: "mlp", mlp: "mlp", res: "res", crosscoder: "res" };
const BAND_ORDER = ["other", "att", "mlp", "res"];
const WORDS = { transcoder: "transcoder", clt: "cross-layer transcoder", mlp: "MLP output", att: "attention",
  res: "residual stream", crosscoder: "crosscoder", embedding: "embedding" };
const SHORT = { transcoder: "clt", res: "crosscoder" };
const JOINED = { transcoder: "cross-layer transcoder", res: "crosscoder" };

function buildNodes() {
  const n = data.nodes;
  return n.id.map((id, i) => {
    const one = { i, id, kind: n.kind[i], site: n.site[i], layer: n.layer[i], position: n.position[i], latent: n.latent[i],
      coder: n.coder[i] === null ? null : data.coders[n.coder[i]], activation: n.activation[i], probability: n.probability[i],
      token: n.token_id[i], label: n.label[i] || "", constants: n.constants[i], note: n.note[i] === null ? null : data.notes[n.note[i]], into: [], from: [] };
    one.band = BANDS[one.site] || "other";
    one.layered = one.kind === "latent" && (data.layered.includes(n.coder[i]) || one.site === "clt" || one.site === "crosscoder");
    one.word = data.tokens[one.position];
    one.title = titleOf(one);
    const promoted = one.note ? one.note.planes.flatMap((plane) => plane.promoted.map((pair) => pair[0])) : [];
    one.text = [id, one.title, one.label, one.word, one.site, one.coder, one.note && one.note.label, ...promoted]
      .filter(Boolean).join("\n").toLowerCase();
    return one;
  });
}

function titleOf(node) {
  const place = node.layer === null ? "" : ` L${node.layer}`;
  switch (node.kind) {
    case "latent": return `${node.layered && SHORT[node.site] || node.site || "latent"}${place} #${node.latent === null ? "?" : node.latent}`;
    case "error": return node.label || `error, ${node.site || ""}${place}`;
    case "embedding": return `embedding “${node.word}”`;
    default: return `logit “${node.label || node.token}”`;
  }
}

const kindOf = (node) => (node.layered && JOINED[node.site]) || WORDS[node.site] || node.site || "of the coder";

function describe(node) {
  const parts = [node.title];
  if (node.kind === "latent" && shownLabel(node)) parts.push(shownLabel(node));
  if (node.kind !== "embedding") parts.push(`at “${node.word}”`);
  return parts.join(", ");
}

const shownLabel = (node) => node.label || (node.note && node.note.label) || "";

const nodes = buildNodes();
const rowOfId = new Map(nodes.map((node) => [node.id, node.i]));

function buildGraph() {
  const { source, target, weight } = data.edges;
  const start = Float64Array.from(nodes, (n) => (n.kind === "logit" ? n.probability || 0 : 0));
  const graph = { count: nodes.length, source, target, weight, start, edges: source.map((_, e) => e),
    fixed: nodes.map((n) => n.kind === "embedding" || n.kind === "logit"), sink: nodes.map((n) => n.kind === "latent"),
    totals: Float64Array.from(data.totals) };
  for (const e of graph.edges) { nodes[target[e]].into.push(e); nodes[source[e]].from.push(e); }
  graph.influence = influenceOf(graph, graph.edges, graph.totals);
  const whole = graph.influence.reduce((a, b) => a + b, 0) || 1;
  nodes.forEach((n, i) => { n.influence = graph.influence[i] / whole; });
  return graph;
}

const graph = buildGraph();

const state = { node: data.thresholds.node, edge: data.thresholds.edge, clicked: null, pinned: new Set(), groups: [], places: {},
  view: "graph", query: "", zoom: 1, all: true };
// Not in the link: what the pointer and the keyboard are at, and what the thresholds leave.
const now = { hovered: null, focused: null, shown: [], shownEdges: [], visible: new Uint8Array(nodes.length), found: new Set() };
state.groups = data.supernodes.map(([name, ...ids]) => ({ name, members: ids.map((id) => rowOfId.get(id)) }));

const groupOf = (i) => state.groups.find((group) => group.members.includes(i)) || null;

function link() {
  const set = new URLSearchParams();
  set.set("node", String(state.node));
  set.set("edge", String(state.edge));
  if (state.clicked !== null) set.set("clicked", state.clicked.group ? `group:${state.clicked.group}` : nodes[state.clicked.node].id);
  if (state.pinned.size) set.set("pinned", JSON.stringify([...state.pinned].map((i) => nodes[i].id)));
  set.set("groups", JSON.stringify(state.groups.map((g) => [g.name, ...g.members.map((i) => nodes[i].id)])));
  if (Object.keys(state.places).length) set.set("places", JSON.stringify(state.places));
  if (state.view !== "graph") set.set("view", state.view);
  if (state.query) set.set("search", state.query);
  if (state.zoom !== 1) set.set("zoom", String(state.zoom));
  if (!state.all) set.set("all", "0");
  return `#${set}`;
}

// Links may be of another graph, or made by hand: what does not fit this graph is left out.
function follow(hash) {
  const set = new URLSearchParams(hash.replace(/^#/, ""));
  const parsed = (name) => { try { return JSON.parse(set.get(name)); } catch { return null; } };
  const share = (name, old) => { const v = parseFloat(set.get(name)); return v >= 0 && v <= 1 ? v : old; };
  const listed = (value) => (Array.isArray(value) ? value : []);
  const rows = (ids) => listed(ids).map((id) => rowOfId.get(id)).filter((i) => i !== undefined);
  state.node = share("node", state.node);
  state.edge = share("edge", state.edge);
  state.pinned = new Set(rows(parsed("pinned")));
  if (set.has("groups")) {
    state.groups = [];
    for (const one of listed(parsed("groups"))) {
      const [name, ...ids] = listed(one);
      const members = rows(ids).filter((i) => !groupOf(i));
      if (typeof name === "string" && members.length) state.groups.push({ name: freeName(name), members });
    }
  }
  const clicked = set.get("clicked") || "", name = clicked.replace(/^group:/, "");
  if (rowOfId.has(clicked)) state.clicked = { node: rowOfId.get(clicked) };
  else state.clicked = clicked.startsWith("group:") && state.groups.some((g) => g.name === name) ? { group: name } : null;
  state.places = {};
  for (const [key, place] of Object.entries(parsed("places") || {})) {
    if (Array.isArray(place) && place.length === 2 && place.every((v) => v >= 0 && v <= 1)) state.places[key] = place;
  }
  state.view = set.get("view") === "summary" ? "summary" : "graph";
  state.query = set.get("search") || "";
  const zoom = parseFloat(set.get("zoom"));
  state.zoom = zoom >= 0.4 && zoom <= 4 ? zoom : 1;
  state.all = set.get("all") !== "0";
}

function freeName(name) {
  const taken = new Set(state.groups.map((group) => group.name));
  for (let n = 1; ; n++) {
    const one = n === 1 ? name : `${name} (${n})`;
    if (!taken.has(one)) return one;
  }
}

let writing = 0;
function remember() {
  clearTimeout(writing);
  writing = setTimeout(() => { try { history.replaceState(null, "", link()); } catch { /* a page inside another */ } }, 120);
}

function put(i, name) {
  for (const group of state.groups) group.members = group.members.filter((one) => one !== i);
  if (name !== null) {
    const group = state.groups.find((one) => one.name === name);
    if (group) group.members.push(i);
    else state.groups.push({ name, members: [i] });
  }
  state.groups = state.groups.filter((group) => group.members.length);
  if (state.clicked && state.clicked.group && !state.groups.some((g) => g.name === state.clicked.group)) state.clicked = null;
}

const percent = (share) => (share >= 0.1 ? `${Math.round(share * 100)} %` : `${(share * 100).toPrecision(2)} %`);
const counted = (number) => number.toLocaleString("en");
const figure = (value) => (value === null ? "–" : Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(3));
const signed = (value) => (value > 0 ? "+" : "−") + figure(Math.abs(value));
const say = (text) => { byId("said").textContent = text; };
