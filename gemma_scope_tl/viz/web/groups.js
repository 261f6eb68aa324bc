// Supernodes as chips, and the summary: supernodes, pinned nodes and logits as boxes with summed edges between them.

function showGroups() {
  const strip = byId("groups");
  strip.replaceChildren(make("span", {}, "Supernodes"));
  state.groups.forEach((group, k) => {
    const chip = make("button", { class: `chip ${state.clicked && state.clicked.group === group.name ? "on" : ""}`, title: group.name, "data-group": group.name, onclick: () => select({ group: group.name }) }, `${visible(group.name)} (${group.members.length})`);
    chip.style.borderColor = groupColour(k);
    strip.append(chip);
  });
  const start = () => { if (state.clicked && state.clicked.node !== undefined) startGroup([state.clicked.node]); else say("Choose a node first."); };
  strip.append(make("button", { class: "chip new", "data-new": "1", title: "Drop a node here, or make one of the chosen node", onclick: start }, "+ new"));
}

function startGroup(members) {
  const name = freeName(shownLabel(nodes[members[0]]).slice(0, 40) || "supernode");
  members.forEach((i) => put(i, name));
  select({ group: name });
  const field = byId("group-name");
  if (field) { field.focus(); field.select(); }
}

// A drop of a node onto another one: both are in the other's supernode, or in a new one.
function join(moved, other) {
  if (moved === other) return;
  const group = groupOf(other);
  if (group) { put(moved, group.name); select({ group: group.name }); } else startGroup([other, moved]);
}

const boxKey = (box) => (box.members ? `group:${box.name}` : box.id);

function boxesOf() {
  const alone = [...state.pinned].filter((i) => !groupOf(i)).map((i) => nodes[i]);
  const boxes = [...state.groups, ...alone];
  if (!boxes.length) return [];
  const logits = nodes.filter((n) => n.kind === "logit" && !groupOf(n.i) && !state.pinned.has(n.i)).sort((a, b) => b.probability - a.probability).slice(0, 1);
  return [...boxes, ...logits];
}

function placed(boxes) {
  const rows = new Map(), level = (n) => (n.kind === "embedding" ? -1 : n.kind === "logit" ? 1e3 : n.layer === null ? -0.5 : n.layer);
  const mean = (box, f) => { const list = box.members ? box.members.map((i) => nodes[i]) : [box]; return list.reduce((a, n) => a + f(n), 0) / list.length; };
  const keys = [...new Set(boxes.map((box) => Math.round(mean(box, level))))].sort((a, b) => a - b);
  for (const box of boxes) {
    const key = Math.round(mean(box, level));
    if (!rows.has(key)) rows.set(key, []);
    rows.get(key).push(box);
  }
  const places = new Map();
  for (const [key, list] of rows) {
    list.sort((a, b) => mean(a, (n) => n.position) - mean(b, (n) => n.position));
    // Rows are shifted in turn, so that an edge does not run behind the boxes between its ends.
    const row = keys.indexOf(key), shift = keys.length > 2 ? [0, 0.13, -0.13][row % 3] / list.length : 0;
    list.forEach((box, k) => places.set(box, [(k + 0.5) / list.length + shift, 1 - (row + 0.5) / keys.length]));
  }
  for (const box of boxes) if (state.places[boxKey(box)]) places.set(box, state.places[boxKey(box)]);
  return places;
}

function showSummary() {
  const boxes = boxesOf(), area = byId("boxes");
  byId("summary-hint").textContent = boxes.length ? "" : "Pin nodes or group them to supernodes: they appear here as boxes, with the sums of the edges between them.";
  const places = placed(boxes), wide = area.clientWidth, high = area.clientHeight;
  area.replaceChildren();
  for (const box of boxes) {
    const [x, y] = places.get(box), group = box.members !== undefined;
    const on = state.clicked && (group ? state.clicked.group === box.name : state.clicked.node === box.i);
    const element = make("button", { class: `box ${on ? "on" : ""}`, "data-key": boxKey(box), title: group ? box.name : describe(box) },
      make("strong", {}, visible(group ? box.name : shownLabel(box) || box.title)),
      make("small", {}, group ? `${box.members.length} ${box.members.length === 1 ? "node" : "nodes"}` : visible(shownLabel(box) && box.kind === "latent" ? box.title : box.word)));
    element.style.left = `${x * 100}%`;
    element.style.top = `${y * 100}%`;
    if (group) element.style.borderColor = groupColour(state.groups.indexOf(box));
    movable(element, box);
    area.append(element);
    const half = element.offsetWidth / 2 + 4, tall = element.offsetHeight / 2 + 4;
    element.style.left = `${Math.min(Math.max(x * wide, half), Math.max(half, wide - half))}px`;
    element.style.top = `${Math.min(Math.max(y * high, tall), Math.max(tall, high - tall))}px`;
  }
  summaryEdges(boxes);
}

function summaryEdges(boxes) {
  const owner = new Map(), sums = new Map();
  boxes.forEach((box, k) => (box.members || [box.i]).forEach((i) => owner.set(i, k)));
  for (const e of graph.edges) {
    const a = owner.get(graph.source[e]), b = owner.get(graph.target[e]);
    if (a !== undefined && b !== undefined && a !== b) sums.set(`${a} ${b}`, (sums.get(`${a} ${b}`) || 0) + graph.weight[e]);
  }
  const list = [...sums].map(([key, weight]) => [...key.split(" ").map(Number), weight]).sort((x, y) => Math.abs(x[2]) - Math.abs(y[2]));
  const strongest = list.length ? Math.abs(list[list.length - 1][2]) || 1 : 1, picture = byId("summary-edges"), elements = byId("boxes").children;
  picture.replaceChildren();
  const labels = [];
  for (const [a, b, weight] of list) {
    const from = middle(elements[a]), to = middle(elements[b]), share = Math.abs(weight) / strongest;
    if (share < 0.01) continue;
    const end = edgeOf(from, to, elements[b]), begin = edgeOf(to, from, elements[a]);
    const colour = weight < 0 ? "var(--down)" : "var(--up)";
    const line = draw("path", { d: `M${begin}L${end}`, fill: "none" });
    line.style.cssText = `stroke:${colour};stroke-width:${1 + 4.5 * Math.sqrt(share)};opacity:${0.35 + 0.6 * share};${weight < 0 ? "stroke-dasharray:6 4" : ""}`;
    const turn = (Math.atan2(to[1] - from[1], to[0] - from[0]) * 180) / Math.PI;
    const tip = draw("path", { d: "M0,0L-11,-5L-11,5Z", transform: `translate(${end}) rotate(${turn})` });
    tip.style.fill = colour;
    picture.append(line, tip);
    if (share >= 0.03) labels.push([(begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2, weight]);
  }
  for (const [x, y, weight] of labels) {
    const text = draw("text", { x, y: y + 4, "text-anchor": "middle" });
    text.textContent = signed(weight);
    text.style.cssText = "paint-order:stroke;stroke:var(--faint);stroke-width:4px;font-weight:600";
    picture.append(text);
  }
}

const middle = (element) => [parseFloat(element.style.left), parseFloat(element.style.top)];

// Where the line from `from` to the middle of a box meets its edge.
function edgeOf(from, to, element) {
  const dx = to[0] - from[0], dy = to[1] - from[1];
  const t = Math.min((element.offsetWidth / 2 + 3) / (Math.abs(dx) || 1e-9), (element.offsetHeight / 2 + 3) / (Math.abs(dy) || 1e-9), 1);
  return [to[0] - dx * t, to[1] - dy * t];
}

function movable(element, box) {
  let start = null, moved = false;
  const area = byId("boxes");
  const over = (event) => [...area.children].find((other) => { const r = other.getBoundingClientRect(); return other !== element && event.clientX > r.left && event.clientX < r.right && event.clientY > r.top && event.clientY < r.bottom; });
  element.addEventListener("pointerdown", (event) => { if (event.button === 0) { start = [event.clientX, event.clientY, ...middle(element)]; moved = false; element.setPointerCapture(event.pointerId); } });
  element.addEventListener("pointermove", (event) => {
    if (!start) return;
    const dx = event.clientX - start[0], dy = event.clientY - start[1];
    if (!moved && Math.hypot(dx, dy) < 5) return;
    moved = true;
    element.style.left = `${start[2] + dx}px`;
    element.style.top = `${start[3] + dy}px`;
    [...area.children].forEach((other) => other.classList.toggle("drop", other === over(event)));
    summaryEdges(boxesOf());
  });
  element.addEventListener("pointerup", (event) => {
    if (start && moved) {
      const target = over(event), other = target && boxesOf().find((one) => boxKey(one) === target.dataset.key);
      if (other) { merge(box, other); return; }
      const [x, y] = middle(element), unit = (v) => Math.round(Math.min(1, Math.max(0, v)) * 1000) / 1000;
      state.places[boxKey(box)] = [unit(x / area.clientWidth), unit(y / area.clientHeight)];
      showSummary();
      remember();
    }
    start = null;
  });
  element.addEventListener("pointercancel", () => { start = null; showSummary(); });
  element.addEventListener("click", () => { if (!moved) select(box.members ? { group: box.name } : { node: box.i }); moved = false; });
}

function merge(box, other) {
  const members = box.members ? [...box.members] : [box.i], target = other.members ? [...other.members] : [other.i];
  const name = other.members ? other.name : null;
  if (name) { members.forEach((i) => put(i, name)); select({ group: name }); } else startGroup([...target, ...members]);
}
