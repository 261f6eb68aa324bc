// Influence and pruning, as AttributionGraph.influences and AttributionGraph.pruned compute them.
// An edge's share is |weight| over the sum of |weight| into its target, of all edges, those left out of the page too.

function influenceOf(graph, edges, totals) {
  const { source, target, weight, start } = graph;
  const found = new Float64Array(graph.count);
  let now = start;
  for (let round = 0; round <= graph.count; round++) {
    const next = new Float64Array(graph.count);
    let any = false;
    for (const e of edges) {
      const flow = now[target[e]];
      if (flow === 0 || totals[target[e]] === 0) continue;
      next[source[e]] += (flow * Math.abs(weight[e])) / totals[target[e]];
      any = true;
    }
    if (!any) break;
    for (let i = 0; i < found.length; i++) found[i] += next[i];
    now = next;
  }
  return found;
}

// The least score among the largest scores that together reach this share of the sum.
function scoreAt(scores, share) {
  const sorted = Float64Array.from(scores).sort().reverse();
  const whole = sorted.reduce((a, b) => a + b, 0);
  if (!(whole > 0)) return 0;
  let sum = 0;
  for (const score of sorted) {
    sum += score;
    if (sum / whole >= share) return score;
  }
  return sorted[sorted.length - 1];
}

// Nodes and edges that remain. `kept` marks nodes that stay whatever their influence.
function pruned(graph, nodeShare, edgeShare, kept) {
  const { source, target, weight, fixed, sink } = graph;
  const least = scoreAt(graph.influence, nodeShare);
  const nodes = graph.influence.map((v, i) => (fixed[i] || kept.has(i) || v >= least ? 1 : 0));
  let edges = graph.edges.filter((e) => nodes[source[e]] && nodes[target[e]]);
  const totals = new Float64Array(graph.count);
  for (const e of edges) totals[target[e]] += Math.abs(weight[e]);
  const flow = influenceOf(graph, edges, totals);
  const scores = edges.map((e) => (Math.abs(weight[e]) / (totals[target[e]] || 1)) * (flow[target[e]] + graph.start[target[e]]));
  const leastEdge = scoreAt(scores, edgeShare);
  edges = edges.filter((e, i) => scores[i] >= leastEdge);
  for (;;) {
    const out = new Uint8Array(graph.count), into = new Uint8Array(graph.count);
    for (const e of edges) { out[source[e]] = 1; into[target[e]] = 1; }
    let changed = false;
    for (let i = 0; i < graph.count; i++) {
      const alone = !fixed[i] && !kept.has(i) && (!out[i] || (sink[i] && !into[i]));
      if (nodes[i] && alone) { nodes[i] = 0; changed = true; }
    }
    if (!changed) return { nodes, edges };
    edges = edges.filter((e) => nodes[source[e]] && nodes[target[e]]);
  }
}
