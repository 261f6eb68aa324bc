// Controls, pointer, keyboard, and the order in which everything is drawn.

const narrow = matchMedia("(max-width: 760px)");

function apply() {
  const kept = new Set(state.pinned);
  for (const group of state.groups) group.members.forEach((i) => kept.add(i));
  if (state.clicked && state.clicked.node !== undefined) kept.add(state.clicked.node);
  const left = pruned(graph, state.node, state.edge, kept);
  now.shownEdges = left.edges;
  now.visible = Uint8Array.from(left.nodes);
  now.shown = nodes.filter((node) => now.visible[node.i]);
  if (now.focused !== null && !now.visible[now.focused]) now.focused = null;
  if (now.hovered !== null && !now.visible[now.hovered]) now.hovered = null;
  find();
  byId("node-value").textContent = percent(state.node);
  byId("edge-value").textContent = percent(state.edge);
  byId("counts").textContent = `${counted(now.shown.length)} of ${counted(data.counts.nodes)} nodes, ${counted(left.edges.length)} of ${counted(data.counts.edges)} edges`;
}

function find() {
  const query = state.query.trim().toLowerCase();
  now.found = new Set(query ? nodes.filter((node) => node.text.includes(query)).map((node) => node.i) : []);
}

function refresh() {
  apply();
  byId("graph-view").hidden = state.view !== "graph";
  byId("summary-view").hidden = state.view !== "summary";
  for (const name of ["graph", "summary"]) byId(`tab-${name}`).setAttribute("aria-selected", String(state.view === name));
  byId("node-slider").value = state.node;
  byId("edge-slider").value = state.edge;
  byId("search").value = state.query;
  byId("all-edges").checked = state.all;
  showGroups();
  showPanel();
  if (state.view === "graph") { layOut(); drawPlot(); } else showSummary();
  remember();
}

let waiting = 0;
function soon(work) {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(work);
}

function select(chosen) {
  state.clicked = chosen;
  if (chosen && chosen.node !== undefined) now.focused = chosen.node;
  refresh();
  if (chosen) openSheet(true, byId("panel").classList.contains("tall"));
  if (chosen && chosen.node !== undefined && state.view === "graph") reveal(chosen.node);
}

function togglePin(i) {
  if (state.pinned.has(i)) state.pinned.delete(i); else state.pinned.add(i);
  refresh();
  say(state.pinned.has(i) ? "Pinned" : "Unpinned");
}

// On a narrow screen the panel is a sheet: closed, half open, or tall. Half open, it leaves the plot its own room.
function openSheet(open, tall = false) {
  byId("panel").classList.toggle("open", open);
  byId("panel").classList.toggle("tall", open && tall);
  byId("handle").setAttribute("aria-expanded", String(open));
  if (document.body.classList.contains("sheet") === open) return;
  document.body.classList.toggle("sheet", open);
  if (narrow.matches) redraw();
}

function redraw() {
  if (state.view === "graph") { layOut(); drawPlot(); } else showSummary();
  if (state.view === "graph" && state.clicked && state.clicked.node !== undefined) reveal(state.clicked.node);
}

function pointAt(i) {
  if (now.hovered === i) return;
  now.hovered = i;
  restyle();
}

function showTip(i, x, y) {
  const tip = byId("tip"), node = nodes[i], label = node.kind === "latent" ? shownLabel(node) : "";
  const numbers = [node.activation === null ? null : `activation ${figure(node.activation)}`, node.kind === "logit" ? `probability ${percent(node.probability || 0)}` : `influence ${percent(node.influence)}`];
  tip.replaceChildren(make("b", {}, visible(node.title)), ...(label ? [make("div", {}, visible(label))] : []),
    ...(node.kind !== "embedding" ? [make("div", { class: "soft" }, "at ", token(node.word))] : []), make("div", { class: "soft" }, numbers.filter(Boolean).join(", ")));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
}

function hideTip() { byId("tip").hidden = true; }

function at(event) {
  const box = plot.getBoundingClientRect();
  return nearest(event.clientX - box.left + plot.scrollLeft, event.clientY - box.top + plot.scrollTop, event.pointerType === "touch" ? 26 : 16);
}

// A press becomes a click, or after some pixels (with a finger: after holding it) a drag of the node.
const press = { node: null, x: 0, y: 0, dragging: false, timer: 0, touch: false };

function startDrag() {
  press.dragging = true;
  hideTip();
  const ghost = byId("ghost");
  ghost.textContent = visible(nodes[press.node].title);
  ghost.hidden = false;
}

function dropPlace(event) {
  const under = document.elementsFromPoint(event.clientX, event.clientY).find((one) => one.dataset && (one.dataset.group !== undefined || one.dataset.new));
  if (under) return under;
  const other = plot.contains(document.elementFromPoint(event.clientX, event.clientY)) ? at(event) : null;
  return other !== null && other !== press.node ? other : null;
}

plot.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  Object.assign(press, { node: at(event), x: event.clientX, y: event.clientY, dragging: false, touch: event.pointerType === "touch" });
  clearTimeout(press.timer);
  if (press.touch && press.node !== null) press.timer = setTimeout(startDrag, 450);
});
addEventListener("pointermove", (event) => {
  const far = Math.hypot(event.clientX - press.x, event.clientY - press.y) > 6;
  if (press.node !== null && !press.dragging && far) { if (press.touch) { clearTimeout(press.timer); press.node = null; } else startDrag(); }
  if (!press.dragging) return;
  const ghost = byId("ghost"), place = dropPlace(event);
  ghost.style.left = `${event.clientX + 12}px`;
  ghost.style.top = `${event.clientY + 12}px`;
  document.querySelectorAll(".drop").forEach((one) => one.classList.remove("drop"));
  if (place !== null && typeof place === "object") place.classList.add("drop");
  pointAt(typeof place === "number" ? place : press.node);
});
addEventListener("pointerup", (event) => {
  clearTimeout(press.timer);
  const { node, dragging } = press;
  Object.assign(press, { node: null, dragging: false });
  byId("ghost").hidden = true;
  document.querySelectorAll(".drop").forEach((one) => one.classList.remove("drop"));
  if (dragging) {
    now.hovered = null;
    press.node = node;
    const place = dropPlace(event);
    press.node = null;
    if (typeof place === "number") join(node, place);
    else if (place && place.dataset.new) startGroup([node]);
    else if (place) { put(node, place.dataset.group); select({ group: place.dataset.group }); } else restyle();
  } else if (event.target instanceof Node && plot.contains(event.target) && event.button === 0) {
    if (node !== null && (event.ctrlKey || event.metaKey)) togglePin(node);
    else if (node !== null) select({ node });
    else if (at(event) === null && Math.hypot(event.clientX - press.x, event.clientY - press.y) < 6) select(null);
  }
});
addEventListener("pointercancel", () => { clearTimeout(press.timer); Object.assign(press, { node: null, dragging: false }); byId("ghost").hidden = true; });
plot.addEventListener("touchmove", (event) => { if (press.dragging) event.preventDefault(); }, { passive: false });
plot.addEventListener("contextmenu", (event) => { if (press.dragging) event.preventDefault(); });
plot.addEventListener("pointermove", (event) => {
  if (press.dragging || event.pointerType === "touch") return;
  const i = at(event);
  pointAt(i);
  if (i === null) hideTip(); else showTip(i, event.clientX, event.clientY);
});
plot.addEventListener("pointerleave", () => { if (!press.dragging) { pointAt(null); hideTip(); } });
plot.addEventListener("scroll", () => soon(scrolled), { passive: true });
plot.addEventListener("focus", restyle);
plot.addEventListener("blur", restyle);

function step(direction) {
  if (!now.shown.length) return;
  if (now.focused === null) now.focused = (now.shown.find((n) => n.kind === "logit") || now.shown[0]).i;
  else {
    const here = nodes[now.focused], sideways = direction[0] !== 0;
    let best = null, least = Infinity;
    for (const node of now.shown) {
      const dx = node.x - here.x, dy = node.y - here.y;
      if (node.i === here.i || (sideways ? node.row !== here.row || dx * direction[0] <= 0.01 : node.row === here.row || dy * direction[1] <= 0)) continue;
      const far = sideways ? Math.abs(dx) + 0.1 * Math.abs(dy) : Math.abs(dy) * 3 + Math.abs(dx);
      if (far < least) { least = far; best = node.i; }
    }
    if (best === null) return;
    now.focused = best;
  }
  reveal(now.focused);
  restyle();
  say(describe(nodes[now.focused]));
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
plot.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (STEPS[event.key]) step(STEPS[event.key]);
  else if ((event.key === "Enter" || event.key === " ") && now.focused !== null) select({ node: now.focused });
  else if (event.key.toLowerCase() === "p" && now.focused !== null) togglePin(now.focused);
  else if (event.key.toLowerCase() === "g" && now.focused !== null) { select({ node: now.focused }); byId("group-choice").focus(); }
  else return;
  event.preventDefault();
});
addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLElement && event.target.matches("input[type=search], input[type=text], select");
  if (event.key === "Escape") { if (typing) plot.focus(); else if (state.clicked) select(null); openSheet(false); return; }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { byId("controls").open = true; byId("search").focus(); event.preventDefault(); }
  else if (event.key === "+" || event.key === "=") zoomBy(1.25);
  else if (event.key === "-") zoomBy(0.8);
  else if (event.key.toLowerCase() === "s") { state.view = state.view === "graph" ? "summary" : "graph"; refresh(); }
});

function zoomBy(factor) {
  state.zoom = Math.min(4, Math.max(0.4, Math.round(state.zoom * factor * 100) / 100));
  refresh();
}

byId("node-slider").addEventListener("input", (event) => { state.node = +event.target.value; soon(refresh); });
byId("edge-slider").addEventListener("input", (event) => { state.edge = +event.target.value; soon(refresh); });
byId("search").addEventListener("input", (event) => {
  state.query = event.target.value;
  state.clicked = null;
  find();
  soon(() => { showPanel(); restyle(); remember(); say(`${now.found.size} found`); });
});
byId("all-edges").addEventListener("change", (event) => { state.all = event.target.checked; restyle(); remember(); });
byId("zoom-in").addEventListener("click", () => zoomBy(1.25));
byId("zoom-out").addEventListener("click", () => zoomBy(0.8));
byId("tab-graph").addEventListener("click", () => { state.view = "graph"; refresh(); });
byId("tab-summary").addEventListener("click", () => { state.view = "summary"; refresh(); });
byId("about").addEventListener("click", showAbout);
const pull = { from: 0, by: 0 };
byId("handle").addEventListener("pointerdown", (event) => { Object.assign(pull, { from: event.clientY, by: 0 }); byId("handle").setPointerCapture(event.pointerId); });
byId("handle").addEventListener("pointermove", (event) => { if (event.buttons) pull.by = event.clientY - pull.from; });
byId("handle").addEventListener("click", () => {
  const panel = byId("panel").classList, open = panel.contains("open"), tall = panel.contains("tall");
  if (Math.abs(pull.by) < 12) openSheet(!open);
  else if (pull.by < 0) openSheet(true, open);
  else openSheet(tall, false);
  pull.by = 0;
});
byId("copy").addEventListener("click", async () => {
  const address = location.href.replace(/#.*$/, "") + link();
  try { history.replaceState(null, "", link()); } catch { /* a page inside another */ }
  try { await navigator.clipboard.writeText(address); byId("copy").textContent = "Copied"; } catch { byId("copy").textContent = "See the address bar"; }
  setTimeout(() => { byId("copy").textContent = "Copy link"; }, 1800);
});

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  if (view.rows.length && state.view === "graph") { byId("content").style.backgroundImage = bands(); drawEdges(); }
}
let saved = null;
try { saved = localStorage.getItem("graph-theme"); } catch { /* storage is off */ }
const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(saved || (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!saved) setTheme(dark.matches ? "dark" : "light"); });
byId("theme").addEventListener("click", () => {
  saved = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("graph-theme", saved); } catch { /* storage is off */ }
  setTheme(saved);
});

function showLegend() {
  const mark = (one) => {
    const picture = draw("svg", { width: 15, height: 15, viewBox: "-7.5 -7.5 15 15" });
    picture.append(draw("path", { class: `node ${styleOf(one)}`, d: SHAPES[shapeOf(one)](5) }));
    return picture;
  };
  const kinds = new Map(), legend = byId("legend");
  for (const node of nodes) {
    const word = node.kind === "latent" ? `latent (${kindOf(node)})` : { error: "error, or what has no coder", embedding: "token", logit: "next token" }[node.kind];
    if (!kinds.has(word)) kinds.set(word, mark(node));
  }
  for (const [word, picture] of kinds) legend.append(make("span", {}, picture, word));
  const line = (name, dash) => { const picture = draw("svg", { width: 24, height: 8 }), path = draw("path", { d: "M0,4H24" }); path.style.cssText = `stroke:var(--${name});stroke-width:2.5;${dash}`; picture.append(path); return picture; };
  const ring = (style) => { const picture = draw("svg", { width: 16, height: 16, viewBox: "-8 -8 16 16" }), circle = draw("circle", { r: 6 }); circle.style.cssText = `fill:none;${style}`; picture.append(circle); return picture; };
  legend.append(make("span", {}, line("up", ""), "raises"), make("span", {}, line("down", "stroke-dasharray:5 3"), "lowers"),
    make("span", {}, ring("stroke:var(--text);stroke-width:1.4"), "pinned"), make("span", {}, ring("stroke:#cc79a7;stroke-width:2.6"), "in a supernode"));
}

if (narrow.matches) byId("controls").open = false;
byId("title").textContent = data.title;
byId("prompt").textContent = visible(data.text);
byId("prompt").title = data.text;
showLegend();
if (location.hash.length > 1) follow(location.hash);
refresh();
if (state.clicked && state.clicked.node !== undefined) reveal(state.clicked.node); else plot.scrollLeft = plot.scrollWidth;
addEventListener("hashchange", () => { if (location.hash !== link()) { follow(location.hash); refresh(); } });
addEventListener("resize", () => soon(redraw));

// For scripts and the console: what is shown, by the names of nodes.
window.graphPage = {
  view: () => ({ nodes: now.shown.map((n) => n.id), link: link(), supernodes: state.groups.map((g) => [g.name, ...g.members.map((i) => nodes[i].id)]),
    edges: now.shownEdges.map((e) => [nodes[graph.source[e]].id, nodes[graph.target[e]].id]) }),
  place: (id) => { const node = nodes[rowOfId.get(id)], box = plot.getBoundingClientRect(); return [node.x - plot.scrollLeft + box.left, node.y - plot.scrollTop + box.top]; },
};
