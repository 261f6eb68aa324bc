// The graph: tokens along the bottom, layers upwards, a mark for each node, and edges on a canvas below the marks.

const SHAPES = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  hexagon: (r) => polygon(6, r * 1.12, 0),
  diamond: (r) => polygon(4, r * 1.15, 90),
  square: (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
  pill: (r) => `M${-r * 0.8},${-r * 0.9}h${r * 1.6}a${r * 0.9},${r * 0.9} 0 0,1 0,${r * 1.8}h${-r * 1.6}a${r * 0.9},${r * 0.9} 0 0,1 0,${-r * 1.8}Z`,
};

function polygon(corners, r, turn) {
  const at = (k) => { const a = ((turn + (k * 360) / corners) * Math.PI) / 180; return `${(r * Math.cos(a)).toFixed(2)},${(-r * Math.sin(a)).toFixed(2)}`; };
  return `M${Array.from({ length: corners }, (_, k) => at(k)).join("L")}Z`;
}

function shapeOf(node) {
  if (node.kind === "latent") return node.layered ? "hexagon" : "circle";
  return { error: "diamond", embedding: "square", logit: "pill" }[node.kind];
}

const styleOf = (node) => ({ latent: `site-${node.band}`, error: "hollow", embedding: "solid", logit: "solid" })[node.kind];

const plot = byId("plot"), canvas = byId("edges"), surface = byId("nodes");
const view = { rows: [], columns: [], width: 0, height: 0, radius: 5, marks: [] };

function rowKey(node) {
  if (node.kind === "embedding") return -1;
  if (node.kind === "logit") return 1e9;
  return node.layer === null ? -0.5 : node.layer * 10 + BAND_ORDER.indexOf(node.band);
}

// Places of the shown nodes. A cell (a row at a token) holds its nodes in lines of at most ten.
function layOut() {
  const pitch = 15 * state.zoom, most = 10;
  view.radius = 5.2 * Math.sqrt(state.zoom);
  const cells = new Map(), rows = new Map(), columns = new Map();
  for (const node of now.shown) {
    node.row = rowKey(node);
    const key = `${node.row} ${node.position}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(node);
  }
  for (const list of cells.values()) {
    list.sort((a, b) => (b.probability || 0) - (a.probability || 0) || b.influence - a.influence || a.i - b.i);
    const { row, position: column } = list[0], wide = row === 1e9 ? list.length * 1.5 : Math.min(list.length, most);
    columns.set(column, Math.max(columns.get(column) || 0, wide));
    rows.set(row, Math.max(rows.get(row) || 0, row === 1e9 ? 1 : Math.ceil(list.length / most)));
  }
  const words = data.tokens.map((token) => clip(visible(token), 14));
  const least = Math.max(18, 17 * state.zoom);
  const sizes = words.map((_, c) => Math.max(least, (columns.get(c) || 0) * pitch + 8));
  const flat = words.every((word, c) => word.length * 6.6 + 6 <= sizes[c]);
  const left = flat ? 8 : 44, right = 78, above = 76;
  view.flat = flat;
  view.depth = flat ? 26 : 84;
  const keys = [...rows.keys()].sort((a, b) => a - b);
  const banded = new Set(nodes.filter((n) => n.layer !== null).map((n) => n.band)).size > 1;
  const names = keys.map((key) => rowName(now.shown.find((node) => node.row === key), banded));
  view.gutter = Math.max(46, ...names.map((name) => name.length * 6.6 + 14));
  // The axes get their sizes before that of the plot is read.
  byId("axis-x").style.height = `${view.depth}px`;
  byId("axis-y").style.width = `${view.gutter}px`;
  const heights = keys.map((key) => rows.get(key) * pitch + 9);
  const spareX = plot.clientWidth - left - right - sum(sizes), spareY = plot.clientHeight - above - sum(heights);
  if (spareX > 0) sizes.forEach((size, c) => { sizes[c] += spareX / sizes.length; });
  if (spareY > 0) heights.forEach((height, r) => { heights[r] += Math.min(spareY / heights.length, 90); });
  let x = left;
  view.columns = words.map((word, c) => ({ word, x: x + sizes[c] / 2, left: x, width: sizes[c], next: (x += sizes[c]) }));
  view.width = Math.max(plot.clientWidth, x + right);
  view.height = Math.max(plot.clientHeight, sum(heights) + above);
  let y = view.height;
  view.rows = keys.map((key, r) => {
    y -= heights[r];
    return { key, y: y + heights[r] / 2, top: y, height: heights[r], name: names[r] };
  });
  const rowAt = new Map(view.rows.map((row) => [row.key, row]));
  for (const list of cells.values()) place(list, rowAt.get(list[0].row), view.columns[list[0].position], pitch, most);
}

function place(list, row, column, pitch, most) {
  const step = row.key === 1e9 ? pitch * 1.5 : pitch, per = row.key === 1e9 ? list.length : Math.min(most, Math.max(1, Math.floor((column.width - 6) / pitch)));
  const lines = Math.ceil(list.length / per), gap = Math.min(pitch, row.height / lines);
  list.forEach((node, k) => {
    const line = Math.floor(k / per), inLine = Math.min(per, list.length - line * per);
    node.x = column.x + ((k % per) - (inLine - 1) / 2) * step;
    node.y = row.y + (line - (lines - 1) / 2) * gap;
  });
}

function rowName(node, banded) {
  if (node.kind === "embedding") return "tokens";
  if (node.kind === "logit") return "logits";
  if (node.layer === null) return "other";
  return banded && node.band !== "other" ? `L${node.layer} ${node.band}` : `L${node.layer}`;
}

const sum = (list) => list.reduce((a, b) => a + b, 0);
const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
// Signs in place of characters that are invisible or that turn the text around them.
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")
  .replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

function drawPlot() {
  byId("content").style.width = `${view.width}px`;
  byId("content").style.height = `${view.height}px`;
  surface.setAttribute("width", view.width);
  surface.setAttribute("height", view.height);
  surface.replaceChildren();
  // The bands of rows lie below the canvas.
  byId("content").style.backgroundImage = bands();
  view.over = draw("g");
  view.marks = new Array(nodes.length);
  const group = draw("g");
  for (const node of now.shown) {
    const mark = draw("path", { class: `node ${styleOf(node)}`, d: SHAPES[shapeOf(node)](view.radius), transform: `translate(${node.x.toFixed(1)},${node.y.toFixed(1)})` });
    view.marks[node.i] = mark;
    group.append(mark);
    if (node.kind === "logit") group.append(slanted(clip(visible(node.label || String(node.token)), 13), node.x + 1, node.y - view.radius - 6, -48, "start"));
  }
  surface.append(view.over, group);
  drawAxes();
  restyle();
}

function bands() {
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--faint").trim();
  const stops = [];
  view.rows.forEach((row, r) => { if (r % 2) stops.push(`transparent ${row.top}px, ${colour} ${row.top}px ${row.top + row.height}px, transparent ${row.top + row.height}px`); });
  return stops.length ? `linear-gradient(${stops.reverse().join(", ")})` : "none";
}

function slanted(text, x, y, angle, anchor) {
  const element = draw("text", { transform: `translate(${x.toFixed(1)},${y.toFixed(1)}) rotate(${angle})`, "text-anchor": anchor });
  element.textContent = text;
  return element;
}

function drawAxes() {
  const { gutter, depth } = view;
  const side = draw("svg", { class: "axis", width: gutter, height: view.height });
  for (const row of view.rows) {
    const text = draw("text", { x: gutter - 7, y: row.y + 4, "text-anchor": "end" });
    text.textContent = row.name;
    side.append(text);
  }
  const below = draw("svg", { class: "axis", width: view.width, height: depth });
  for (const column of view.columns) {
    const text = view.flat ? slanted(column.word, column.x, 17, 0, "middle") : slanted(column.word, column.x + 4, 12, -48, "end");
    below.append(text);
  }
  byId("axis-y").replaceChildren(side);
  byId("axis-x").replaceChildren(below);
  scrolled();
}

function scrolled() {
  const side = byId("axis-y").firstChild, below = byId("axis-x").firstChild;
  if (side) side.style.transform = `translateY(${-plot.scrollTop}px)`;
  if (below) below.style.transform = `translateX(${-plot.scrollLeft}px)`;
  drawEdges();
}

// The nodes whose edges are shown strongly: of the supernode or the node that the pointer is at, else that is clicked.
function selected() {
  if (now.hovered !== null) return new Set([now.hovered]);
  if (state.clicked === null) return new Set();
  if (state.clicked.group) return new Set(state.groups.find((g) => g.name === state.clicked.group).members);
  return new Set([state.clicked.node]);
}

function restyle() {
  const chosen = selected(), linked = new Map();
  for (const e of now.shownEdges) {
    const s = graph.source[e], t = graph.target[e];
    if (chosen.has(t) && !chosen.has(s)) linked.set(s, (linked.get(s) || 0) + graph.weight[e]);
    if (chosen.has(s) && !chosen.has(t)) linked.set(t, (linked.get(t) || 0) + graph.weight[e]);
  }
  for (const node of now.shown) {
    const mark = view.marks[node.i], w = linked.get(node.i);
    mark.classList.toggle("away", chosen.size > 0 && !chosen.has(node.i) && w === undefined);
    mark.classList.toggle("up", w > 0);
    mark.classList.toggle("down", w < 0);
  }
  view.over.replaceChildren();
  const ring = (i, kind, r) => { if (now.visible[i]) view.over.append(draw("circle", { class: `mark ${kind}`, cx: nodes[i].x, cy: nodes[i].y, r: view.radius + r })); };
  state.groups.forEach((group, k) => group.members.forEach((i) => {
    ring(i, "group", 2.6);
    if (now.visible[i]) view.over.lastChild.style.stroke = groupColour(k);
  }));
  for (const i of state.pinned) ring(i, "pin", 4.6);
  for (const i of now.found) ring(i, "found", 4);
  for (const i of chosen) ring(i, "", 3.4);
  if (now.focused !== null && document.activeElement === plot) ring(now.focused, "focus", 6);
  drawEdges();
}

// Six colours that stay apart for all kinds of colour vision, by lightness too (Okabe and Ito).
const groupColour = (k) => ["#cc79a7", "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#d55e00"][k % 6];

function drawEdges() {
  const wide = plot.clientWidth, high = plot.clientHeight, scale = Math.min(window.devicePixelRatio || 1, 2);
  if (canvas.width !== Math.round(wide * scale) || canvas.height !== Math.round(high * scale)) {
    canvas.width = Math.round(wide * scale);
    canvas.height = Math.round(high * scale);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
  }
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.setTransform(scale, 0, 0, scale, -plot.scrollLeft * scale, -plot.scrollTop * scale);
  pen.clearRect(plot.scrollLeft, plot.scrollTop, wide, high);
  const colours = { up: style.getPropertyValue("--up").trim(), down: style.getPropertyValue("--down").trim() };
  const chosen = selected();
  const near = chosen.size ? now.shownEdges.filter((e) => chosen.has(graph.source[e]) || chosen.has(graph.target[e])) : [];
  if (state.all && !chosen.size) strokes(pen, now.shownEdges, colours, Math.min(0.7, 0.05 + 8 / Math.sqrt(now.shownEdges.length + 60)), 2.2);
  if (near.length) strokes(pen, near, colours, 0.85, 4.5);
}

// Edges in few strokes: by sign and by width, which grows with the root of the share of the strongest.
function strokes(pen, edges, colours, alpha, widest) {
  const strongest = edges.reduce((most, e) => Math.max(most, Math.abs(graph.weight[e])), 0) || 1, bins = 6;
  const sorted = Array.from({ length: 2 * bins }, () => []);
  for (const e of edges) {
    const share = Math.sqrt(Math.abs(graph.weight[e]) / strongest);
    sorted[Math.min(bins - 1, Math.floor(share * bins)) * 2 + (graph.weight[e] < 0 ? 1 : 0)].push(e);
  }
  sorted.forEach((some, k) => {
    if (!some.length) return;
    const share = (Math.floor(k / 2) + 0.6) / bins;
    pen.globalAlpha = Math.min(1, alpha * (0.35 + share));
    pen.lineWidth = Math.max(0.5, widest * share);
    pen.strokeStyle = k % 2 ? colours.down : colours.up;
    pen.setLineDash(k % 2 ? [5, 3] : []);
    pen.beginPath();
    for (const e of some) {
      const a = nodes[graph.source[e]], b = nodes[graph.target[e]], bend = (a.y - b.y) * 0.35;
      pen.moveTo(a.x, a.y);
      if (edges.length > 3000) pen.lineTo(b.x, b.y);
      else pen.bezierCurveTo(a.x, a.y - bend, b.x, b.y + bend, b.x, b.y);
    }
    pen.stroke();
  });
  pen.globalAlpha = 1;
}

function nearest(x, y, most) {
  let best = null, least = most * most;
  for (const node of now.shown) {
    const d = (node.x - x) ** 2 + (node.y - y) ** 2;
    if (d < least) { least = d; best = node.i; }
  }
  return best;
}

function reveal(i) {
  const node = nodes[i], pad = 60;
  if (!now.visible[i]) return;
  if (node.x < plot.scrollLeft + pad || node.x > plot.scrollLeft + plot.clientWidth - pad) plot.scrollLeft = node.x - plot.clientWidth / 2;
  if (node.y < plot.scrollTop + pad || node.y > plot.scrollTop + plot.clientHeight - pad) plot.scrollTop = node.y - plot.clientHeight / 2;
}
