// Draws a report: what `story.Story` says it holds, one or several runs. Nothing is fetched.
//
//   inflate, unpack      the blocks in the page -> plotly.js, runs
//   fact sections        head, stages, evaluation, settings, checkpoints: tables
//   figures              curves over tokens, by plotly.js
//   shapes               the slider, and the model as it was at a token
"use strict";

const LIVES = 0xffffffff, ABSENT = 0xfffffffe;
const RUNS = ["#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2"];
const KINDS = ["#2563eb", "#ea580c", "#0d9488", "#9333ea", "#ca8a04", "#db2777"];
const DARKER = ["#93c5fd", "#fdba74", "#5eead4", "#d8b4fe", "#fde047", "#f9a8d4"];
const PARTS = ["#60a5fa", "#f59e0b", "#34d399", "#a78bfa", "#f87171", "#22d3ee", "#94a3b8", "#f472b6", "#a3e635", "#cbd5e1"];
const EMPTY = "#eef1f5", INK = "#111827", SOFT = "#6b7280", LINE = "#e5e7eb";
const BINS = 160, PLACES = 2000;

// Reading -------------------------------------------------------------------------------------------------------------

async function inflate(id) {
  const element = document.getElementById(id);
  const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function unpack(bytes) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const body = bytes.subarray(4 + length);
  const types = { u1: Uint8Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
  return header.map(({ facts, arrays }, number) => {
    const run = { ...facts, number, color: RUNS[number % RUNS.length], arrays: {} };
    for (const [name, [type, count, position]] of Object.entries(arrays)) {
      const size = Number(type[1]), sorted = new Uint8Array(count * size);
      for (let byte = 0; byte < size; byte++)
        for (let i = 0; i < count; i++) sorted[i * size + byte] = body[position + byte * count + i];
      run.arrays[name] = new types[type](sorted.buffer);
    }
    return run;
  });
}

// Words and tables ----------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const whole = (value) => (value === null || value === undefined ? "" : Math.round(value).toLocaleString("en-US"));
const fixed = (value, digits = 4) => (value === null || value === undefined ? "" : Number(value).toFixed(digits));
const share = (part, of) => `${((100 * part) / of).toFixed(1)} %`;

function short(value) {
  const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]];
  for (const [size, letter] of units) if (value >= size) return `${Number((value / (letter === "k" ? 1e3 : size)).toPrecision(4))} ${letter}`;
  return whole(value);
}

function bytes(value) {
  for (const [size, word] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (value >= size) return `${(value / size).toFixed(1)} ${word}`;
  return `${value} B`;
}

function section(title, about, ...content) {
  const made = element("section", {}, element("h2", { textContent: title }), element("p", { className: "about", textContent: about }), ...content);
  document.getElementById("page").append(made);
  return made;
}

const chip = (run) => { const made = element("span", { className: "chip" }); made.style.background = run.color; return made; };
const named = (run, several) => (several ? element("h3", {}, chip(run), run.name) : null);

function table(head, rows, texts = []) {
  const cell = (tag, value, column, row) => {
    const made = element(tag, { className: texts.includes(column) ? "text" : "" });
    if (row && row.differs) made.classList.toggle("differs", column > 0);
    made.append(value instanceof Node ? value : String(value));
    return made;
  };
  const body = rows.map((row) => element("tr", {}, ...row.map((value, column) => cell("td", value, column, row))));
  const top = element("tr", {}, ...head.map((value, column) => cell("th", value, column)));
  return element("div", { className: "scroll" }, element("table", {}, element("thead", {}, top), element("tbody", {}, ...body)));
}

// Fact sections -------------------------------------------------------------------------------------------------------

function head(runs) {
  const several = runs.length > 1, page = document.getElementById("page");
  page.append(element("h1", { textContent: several ? `${runs.length} pruning runs side by side` : `Pruning report: ${runs[0].name}` }));
  for (const run of runs) {
    const [, start, now] = run.parameters, removals = run.arrays.x.length;
    const source = run.source ? `${run.source}, ` : "";
    const line = removals
      ? `${source}${whole(start)} parameters, pruned to ${whole(now)} (${share(now, start)}) in ${whole(removals)} removals`
      : `${source}${whole(now)} parameters, nothing removed`;
    const text = `${line}; ${whole(run.tokens)} tokens, iteration ${whole(run.iteration)}, ${run.status}`;
    page.append(element("p", { className: "soft" }, several ? chip(run) : null, several ? element("b", { textContent: `${run.name}: ` }) : null, text));
    page.append(element("div", { className: "tiles" }, ...tiles(run)));
  }
}

function tiles(run) {
  const tile = (name, value, below) => element("div", { className: "tile" }, element("small", { className: "name", textContent: name }),
    element("b", { textContent: value }), element("small", { textContent: below }));
  const [, start, now] = run.parameters, stages = run.stages, found = [];
  found.push(tile("parameters", short(now), now < start ? `of ${short(start)} (${share(now, start)})` : "the whole source"));
  const last = stages.final || stages.pruned || stages.source;
  if (last) {
    const before = Object.entries(stages).filter(([, stage]) => stage !== last).map(([name, stage]) => `${name} ${fixed(stage.validation_loss, 3)}`);
    found.push(tile("validation loss", fixed(last.validation_loss, 3), before.join(", ") || "nats per token"));
  }
  for (const kind of [...run.kinds, ...run.followers])
    found.push(tile(kind.title, String(kind.now).replace(" to ", "–"), `of ${kind.start}${kind.shared ? "" : " in a layer"}`));
  const [cacheStart, cacheNow] = run.kv_cache;
  found.push(tile("KV cache", short(cacheNow), `elements per token, of ${short(cacheStart)}`));
  const speed = run.arrays["value/tokens per second"];
  if (speed && speed.length) found.push(tile("tokens per second", short([...speed].sort((a, b) => a - b)[speed.length >> 1]), "median, in training"));
  return found;
}

function stages(runs) {
  const rows = [], kinds = [...runs[0].kinds, ...runs[0].followers], several = runs.length > 1;
  const width = (value) => (Array.isArray(value) ? `${Math.min(...value)}–${Math.max(...value)}` : whole(value));
  for (const run of runs)
    for (const [name, stage] of Object.entries(run.stages))
      rows.push([...(several ? [element("span", {}, chip(run), run.name)] : []), name, whole(stage.iteration), whole(stage.tokens), whole(stage.parameters),
        ...kinds.map((kind) => width(stage.widths[kind.name])), fixed(stage.validation_loss), whole(stage.evaluation_tokens_per_second)]);
  const columns = [...(several ? ["run"] : []), "stage", "iteration", "tokens", "parameters", ...kinds.map((kind) => kind.title), "validation loss", "tokens/s (evaluation)"];
  if (rows.length) section("Stages", "What was measured on validation data at each point of the run.", table(columns, rows));
}

function evaluation(runs) {
  for (const run of runs.filter((run) => run.evaluation)) {
    const { models, rows } = run.evaluation;
    const shown = rows.map(([name, measure, ...values]) => [name, measure, ...values.map((value) => fixed(value))]);
    section(`Evaluation${runs.length > 1 ? `: ${run.name}` : ""}`, "Measured after the run, all models on the same text and tasks.", table(["data", "measure", ...models], shown, [1]));
  }
}

function settings(runs) {
  const told = runs.filter((run) => run.settings.length);
  if (!told.length) return;
  const code = (text) => element("code", { textContent: text });
  const names = told[0].settings.map(([name]) => name);
  const at = told.map((run) => new Map(run.settings.map(([name, value, isDefault]) => [name, { value, isDefault }])));
  const row = (name) => [code(name), ...at.map((values) => code(values.get(name)?.value ?? "—"))];
  const differs = (name) => new Set(at.map((values) => values.get(name)?.value)).size > 1;
  const set = (name) => at.some((values) => values.get(name) && !values.get(name).isDefault);
  const texts = told.map((_, i) => i + 1);
  const listed = (rows) => table(["setting", ...told.map((run) => element("span", {}, chip(run), run.name))], rows, texts);
  const chosen = names.filter((name) => set(name) && !differs(name)).map(row);
  const rest = names.filter((name) => !set(name) && !differs(name)).map(row);
  const content = [];
  if (told.length > 1) {
    const rows = names.filter(differs).map((name) => Object.assign(row(name), { differs: true }));
    content.push(element("h3", { textContent: `Different (${rows.length})` }), listed(rows));
    content.push(element("details", {}, element("summary", { textContent: `Equal in all, and not the default (${chosen.length})` }), listed(chosen)));
  } else content.push(listed(chosen));
  content.push(element("details", {}, element("summary", { textContent: `Everything else is the default's (${rest.length})` }), listed(rest)));
  section("Configuration", told.length > 1 ? "Where the runs were set up differently, first." : "What was set differently from the defaults.", ...content);
}

function checkpoints(runs) {
  const rows = [], several = runs.length > 1;
  for (const run of runs)
    for (const one of run.checkpoints)
      rows.push([...(several ? [element("span", {}, chip(run), run.name)] : []), whole(one.iteration), ...(one.damage ? [element("span", { textContent: one.damage }), "", "", "", ""]
        : [whole(one.tokens), whole(one.parameters), one.dtype, one.mesh.join(" × "), bytes(one.bytes)])]);
  section("Checkpoints", "What lies in the run's folder.", table([...(several ? ["run"] : []), "iteration", "tokens", "parameters", "weights", "TP × PP × DP", "size"], rows));
}

// Figures -------------------------------------------------------------------------------------------------------------

const CONFIG = { responsive: true, displayModeBar: false };
const figures = [];

function layout(height, more = {}) {
  return { height, margin: { l: 62, r: 14, t: 34, b: 42 }, font: { family: "system-ui, Arial, sans-serif", size: 12, color: INK }, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    hovermode: "x unified", legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11.5 } }, ...more };
}
const axis = (title, more = {}) => ({ title: { text: title, font: { size: 12, color: SOFT }, standoff: 8 }, gridcolor: LINE, zerolinecolor: LINE, linecolor: LINE, ticks: "", automargin: true, ...more });

function figure(place, traces, design) {
  const holder = element("div", { className: "keep figure" });
  place.append(holder);
  figures.push(holder);
  return Plotly.newPlot(holder, traces, design, CONFIG).then(() => holder);
}

// Of a curve with many points: the lowest and the highest of each stretch.
function thinned(xs, ys, most = 1600) {
  const n = ys.length;
  if (n <= most) return [Array.from(xs), Array.from(ys)];
  const x = [], y = [], stretches = most >> 1;
  for (let s = 0; s < stretches; s++) {
    const a = Math.floor((s * n) / stretches), b = Math.floor(((s + 1) * n) / stretches);
    let low = a, high = a;
    for (let i = a; i < b; i++) { if (ys[i] < ys[low]) low = i; if (ys[i] > ys[high]) high = i; }
    for (const i of low === high ? [low] : [Math.min(low, high), Math.max(low, high)]) { x.push(xs[i]); y.push(ys[i]); }
  }
  return [x, y];
}

function smoothed(values) {
  const keep = 1 - Math.min(1, 25 / Math.max(values.length, 25)), out = [];
  let mean = values[0];
  for (const value of values) { mean = Number.isFinite(value) ? keep * mean + (1 - keep) * value : mean; out.push(mean); }
  return out;
}

function curve(run, tag) {
  const values = run.arrays[`value/${tag}`];
  return values && values.length ? { at: run.arrays[`at/${tag}`], values } : null;
}

function training(runs) {
  const traces = [], shapes = [], several = runs.length > 1;
  for (const run of runs) {
    const label = (text) => (several ? `${run.name}: ${text}` : text);
    const line = (x, y, name, more) => traces.push({ x, y, name: label(name), mode: "lines", line: { color: run.color, width: 1.6 }, ...more });
    const loss = curve(run, "lm loss") || curve(run, "distilled loss");
    if (loss) {
      const [x, y] = thinned(loss.at, loss.values), smooth = thinned(loss.at, smoothed(loss.values));
      line(x, y, "loss of single steps", { opacity: 0.25, line: { color: run.color, width: 1 }, showlegend: false, hoverinfo: "skip" });
      line(...smooth, "training loss, smoothed", {});
    }
    const valid = curve(run, "validation loss");
    if (valid) line(Array.from(valid.at), Array.from(valid.values), "validation loss", { mode: "lines+markers", line: { color: run.color, width: 1, dash: "dot" }, marker: { size: 6, symbol: "diamond" } });
    const xs = run.arrays.x, inTokens = run.xlabel === "training tokens";
    if (xs.length && inTokens) {
      const end = Math.max(run.tokens, xs[xs.length - 1]);
      const [x, y] = thinned(xs, run.arrays.parameters, 1000);
      line([0, ...x, end], [run.parameters[1], ...y, run.parameters[2]], "parameters", { yaxis: "y2", line: { color: run.color, width: 1.8, shape: "hv" }, showlegend: false });
      const stride = Math.ceil(xs.length / 500), marks = Array.from(xs).filter((_, i) => i % stride === 0);
      traces.push({ x: marks, y: marks.map(() => -0.04 * (1 + run.number) ), yaxis: "y4", mode: "markers", name: label(stride > 1 ? `removals, every ${stride}th` : "removals"),
        marker: { symbol: "line-ns", size: 9, line: { width: 1, color: run.color } }, hoverinfo: "skip" });
      shapes.push({ type: "rect", xref: "x", yref: "paper", x0: 0, x1: xs[xs.length - 1], y0: 0, y1: 1, fillcolor: run.color, opacity: 0.05, line: { width: 0 }, layer: "below" });
    }
    const rate = curve(run, "learning rate");
    if (rate) line(...thinned(rate.at, rate.values), "learning rate", { yaxis: "y3", showlegend: false });
  }
  if (!traces.length) return;
  const made = section("Training", "Loss, size and learning rate over tokens. The tinted part is where groups leave; each tick under the loss is a removal.");
  const depth = 0.06 + 0.04 * runs.length;
  figure(made, traces, layout(620, { shapes, xaxis: axis("tokens", { anchor: "y3", rangemode: "tozero" }), yaxis: axis("loss (nats per token)", { domain: [0.47 + depth * 0.4, 1] }),
    yaxis4: { domain: [0.47, 0.47 + depth * 0.3], range: [-0.04 * runs.length - 0.03, -0.01], visible: false, fixedrange: true },
    yaxis2: axis("parameters", { domain: [0.2, 0.43], rangemode: "tozero" }), yaxis3: axis("learning rate", { domain: [0, 0.16], rangemode: "tozero", exponentformat: "e" }) }));
}

// A cell per run and drawing; all of them are there before the first is drawn, which then knows its width.
function cells(made, runs, several, ...drawings) {
  const grid = element("div", { className: "cells" }), places = [];
  made.append(grid);
  for (const run of runs)
    for (const draw of drawings) {
      const place = element("div", {}, named(run, several));
      grid.append(place);
      places.push(() => draw(place, run));
    }
  places.forEach((draw) => draw());
}

function pruning(runs) {
  const pruned = runs.filter((run) => run.arrays.x.length);
  if (!pruned.length) return;
  const several = runs.length > 1;
  const made = section("What left, and why", "Widths relative to the source, and the saliency of the least salient group of each kind at every removal: the least goes. Dots are the groups that went.");
  cells(made, pruned, several, widths, saliencies);
  const margins = section("How close the decisions were", "The gap to the runner-up, relative. Small margins mean that another order of additions, or another batch, could have chosen otherwise.");
  cells(margins, pruned, several, margin);
}

function widths(place, run) {
  const xs = run.arrays.x, end = run.xlabel === "training tokens" ? Math.max(xs[xs.length - 1] * 1.02, 1) : xs[xs.length - 1];
  const step = (values, first, name, color, dash) => {
    const [x, y] = thinned(xs, values, 1000), all = [first, ...y, values[values.length - 1]];
    return { x: [0, ...x, end], y: all.map((value) => value / first), customdata: all, name, mode: "lines", line: { color, dash, width: dash ? 1.6 : 2, shape: "hv" }, hovertemplate: "%{customdata:,}" };
  };
  const traces = run.kinds.filter((kind) => run.arrays[`width/${kind.name}`]).map((kind, i) => step(run.arrays[`width/${kind.name}`], Number(String(kind.start).split(" ").pop()), kind.title, KINDS[i]));
  traces.push(step(run.arrays.parameters, run.parameters[1], "parameters", INK, "dash"));
  figure(place, traces, layout(330, { xaxis: axis(run.xlabel), yaxis: axis("width, relative to the source", { range: [0, 1.05], tickformat: ".0%" }) }));
}

function saliencies(place, run) {
  const xs = run.arrays.x, traces = [], chosen = { x: [], y: [], n: 0 };
  run.groups.forEach((name, i) => {
    const scores = run.arrays[`score/${name}`], kept = [];
    for (let r = 0; r < xs.length; r++) if (scores[r] > 0) kept.push(r);
    if (!kept.length) return;
    const [x, y] = thinned(kept.map((r) => xs[r]), kept.map((r) => scores[r]));
    traces.push({ x, y, name, mode: "lines", line: { color: KINDS[i], width: 1.6 }, hovertemplate: "%{y:.3g}" });
    for (const r of kept) if (run.arrays.group[r] === i) { chosen.x.push(xs[r]); chosen.y.push(scores[r]); }
  });
  const negative = run.groups.reduce((sum, name) => sum + run.arrays[`score/${name}`].reduce((n, s) => n + (s <= 0), 0), 0);
  const stride = Math.ceil(chosen.x.length / 700), some = (values) => values.filter((_, i) => i % stride === 0);
  traces.push({ x: some(chosen.x), y: some(chosen.y), name: stride > 1 ? `removed (every ${stride}th)` : "removed", mode: "markers", marker: { color: INK, size: 3.5 }, hoverinfo: "skip" });
  const note = negative ? [{ text: `not drawn: scores that are not above 0 (${whole(negative)})`, xref: "paper", yref: "paper", x: 1, y: 0, xanchor: "right", yanchor: "bottom", showarrow: false, font: { size: 10.5, color: SOFT } }] : [];
  figure(place, traces, layout(330, { annotations: note, xaxis: axis(run.xlabel), yaxis: axis("saliency of the least group", { type: "log", exponentformat: "power", dtick: 1 }) }));
}

function margin(place, run) {
  const xs = run.arrays.x, margins = run.arrays.margin, traces = [];
  run.groups.forEach((name, i) => {
    let at = [], values = [];
    for (let r = 0; r < xs.length; r++) if (margins[r] > 0 && run.arrays.group[r] === i) { at.push(xs[r]); values.push(margins[r]); }
    if (!at.length) return;
    [at, values] = thinned(at, values, 900);
    traces.push({ x: at, y: values, name, mode: "markers", marker: { color: KINDS[i], size: 4, opacity: 0.6 }, hovertemplate: "%{y:.2e}" });
  });
  if (traces.length) figure(place, traces, layout(270, { hovermode: "closest", xaxis: axis(run.xlabel), yaxis: axis("margin", { type: "log", exponentformat: "power", dtick: 1 }) }));
  else place.append(element("p", { className: "soft", textContent: "No margins were recorded." }));
}

function time(runs) {
  const timed = runs.filter((run) => Object.keys(run.arrays).some((name) => name.startsWith("value/seconds/")));
  if (!timed.length) return;
  const made = section("Where the time goes", "Milliseconds of an iteration by part, stacked, and tokens per second.");
  cells(made, timed, runs.length > 1, (place, run) => {
    const traces = [];
    const tags = Object.keys(run.arrays).filter((name) => name.startsWith("value/seconds/")).map((name) => name.slice(6));
    tags.forEach((tag, i) => {
      const { at, values } = curve(run, tag) || { at: [], values: [] };
      if (!values.length || Math.max(...thinned(at, values)[1]) < 5e-5) return;
      const stretch = Math.max(1, Math.ceil(values.length / 120)), x = [], y = [];
      for (let a = 0; a < values.length; a += stretch) { const part = values.subarray(a, a + stretch); x.push(at[Math.min(a + stretch, at.length) - 1]); y.push((1000 * part.reduce((s, v) => s + v, 0)) / part.length); }
      traces.push({ x, y, name: tag.slice(8), mode: "lines", stackgroup: "parts", line: { width: 0.5, color: PARTS[i % PARTS.length] }, fillcolor: PARTS[i % PARTS.length], hovertemplate: "%{y:.1f} ms" });
    });
    const speed = curve(run, "tokens per second");
    if (speed) { const [x, y] = thinned(speed.at, smoothed(speed.values), 600); traces.push({ x, y, name: "tokens/s", yaxis: "y2", mode: "lines", line: { color: INK, width: 1.4 }, hovertemplate: "%{y:,.0f}/s" }); }
    figure(place, traces, layout(380, { xaxis: axis("tokens", { anchor: "y" }), yaxis: axis("ms per iteration", { domain: [0, 0.6], rangemode: "tozero" }), yaxis2: axis("tokens/s", { domain: [0.66, 1], rangemode: "tozero" }) }));
  });
}

// The model's shape ---------------------------------------------------------------------------------------------------

const state = { x: 0 };

// How many removals have happened when `x` is reached.
function removed(run, x) {
  let low = 0, high = run.arrays.x.length;
  while (low < high) { const middle = (low + high) >> 1; if (run.arrays.x[middle] <= x) low = middle + 1; else high = middle; }
  return low;
}

function liveAt(run, kind, count) {
  const left = run.arrays[`left/${kind.name}`];
  return (site, unit) => { const when = left[site * kind.size + unit]; return when === LIVES || (when !== ABSENT && when >= count); };
}

// z of a heat map: the share of live units of every bin, or which neighbour's group a unit is of (0, 1), empty where gone.
function picture(run, kind, count) {
  const isLive = liveAt(run, kind, count), serves = groupsOf(run, kind), bins = serves ? kind.size : Math.min(kind.size, BINS);
  const z = [], counts = [];
  for (let site = 0; site < kind.sites; site++) {
    const row = new Array(bins).fill(0);
    let live = 0;
    for (let bin = 0; bin < bins; bin++) {
      const from = Math.floor((bin * kind.size) / bins), to = Math.floor(((bin + 1) * kind.size) / bins);
      let alive = 0;
      for (let unit = from; unit < to; unit++) alive += isLive(site, unit);
      live += alive;
      row[bin] = serves ? (alive ? serves[from] % 2 : null) : alive ? alive / (to - from) : null;
    }
    z.push(row);
    counts.push(live);
  }
  return { z, counts };
}

// For a kind whose units share others: which one each has, unless each has its own.
function groupsOf(run, kind) {
  const serves = run.arrays[`serves/${kind.name}`];
  return serves && serves[serves.length - 1] + 1 < kind.size ? serves : null;
}

function followersOf(run, kind, count) {
  const isLive = liveAt(run, kind, count), serves = run.arrays[`serves/${kind.name}`];
  return Array.from({ length: kind.sites }, (_, site) => {
    const found = new Map();
    for (let unit = 0; unit < kind.size; unit++) if (isLive(site, unit)) found.set(serves[unit], (found.get(serves[unit]) || 0) + 1);
    return found;
  });
}

const span = (counts) => { const low = Math.min(...counts), high = Math.max(...counts); return low === high ? whole(low) : `${whole(low)}–${whole(high)}`; };

class Shape {
  constructor(place, run, several) {
    this.run = run;
    this.count = -1;
    this.meters = element("div", { className: "meters" });
    this.box = element("div", { className: "keep" }, named(run, several), this.meters);
    place.append(this.box);
  }

  async build() {
    const layered = this.run.kinds.filter((kind) => !kind.shared), shared = this.run.kinds.filter((kind) => kind.shared);
    const layers = Math.max(...layered.map((kind) => kind.sites), 1), height = Math.max(150, Math.min(560, layers * 20));
    const below = shared.length * 62, whole_ = height + below + 64, traces = [], design = layout(whole_, { hovermode: "closest", showlegend: false, margin: { l: 46, r: 8, t: 40, b: 20 }, annotations: [] });
    const weights = layered.map((kind) => Math.sqrt(Math.min(kind.size, BINS)) + 3), total = weights.reduce((a, b) => a + b, 0);
    const inner = whole_ - 60;
    let left = 0;
    this.run.kinds.forEach((kind, i) => {
      const n = i ? i + 1 : "", bins = groupsOf(this.run, kind) ? kind.size : Math.min(kind.size, BINS), color = KINDS[i];
      let x, y;
      if (kind.shared) { const top = below - 62 * shared.indexOf(kind); x = [0, 0.965]; y = [Math.max(0, (top - 62) / inner), (top - 40) / inner]; }
      else { const width = weights[layered.indexOf(kind)] / total; x = [left + (left ? 0.035 : 0), left + width - 0.07]; y = [(below + 4) / inner, 1]; left += width; }
      const grouped = groupsOf(this.run, kind), per = kind.size / bins;
      traces.push({ type: "heatmap", xaxis: `x${n}`, yaxis: `y${n}`, z: [[0]], zmin: 0, zmax: 1, showscale: false, xgap: bins <= 64 ? 2 : 0, ygap: kind.sites > 40 || kind.shared ? 1 : 2, hoverongaps: false,
        x0: per / 2 - 0.5, dx: per, colorscale: grouped ? [[0, color], [1, DARKER[i]]] : [[0, EMPTY], [0.001, DARKER[i]], [1, color]],
        hovertemplate: kind.shared ? `${kind.label} %{x:.0f}: %{z:.0%} live<extra></extra>` : `layer %{y}, ${kind.label} %{x:.0f}${grouped ? "" : ": %{z:.0%} live"}<extra></extra>` });
      traces.push({ type: "scatter", mode: "text", xaxis: `x${n}`, yaxis: `y${n}`, x: new Array(kind.sites).fill(kind.size - 0.5), y: [...Array(kind.sites).keys()], text: [], textposition: "middle right", textfont: { size: Math.min(12, Math.max(8, height / layers - 3)), color: SOFT }, cliponaxis: false, hoverinfo: "skip" });
      design[`xaxis${n}`] = { domain: x, anchor: `y${n}`, range: [-0.5, kind.size - 0.5], showgrid: false, zeroline: false, ticks: "", tickfont: { size: 10, color: SOFT }, nticks: 9 };
      design[`yaxis${n}`] = { domain: y, anchor: `x${n}`, range: [kind.sites - 0.5, -0.5], showgrid: false, zeroline: false, ticks: "", showticklabels: !kind.shared && layered[0] === kind, tickfont: { size: 10, color: SOFT }, dtick: Math.ceil(layers / 16), title: !kind.shared && layered[0] === kind ? { text: "layer", font: { size: 11, color: SOFT } } : undefined };
      design.annotations.push({ text: `<b>${kind.title}</b>${grouped ? ` / ${this.run.followers.find((one) => one.follows === kind.name).title}` : ""}`, xref: "paper", yref: "paper", x: x[0], y: y[1], yshift: 4, xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 12, color } });
      (design.shapes ||= []).push({ type: "rect", xref: `x${n} domain`, yref: `y${n} domain`, x0: 0, x1: 1, y0: 0, y1: 1, fillcolor: EMPTY, line: { width: 0 }, layer: "below" });
    });
    this.plot = await figure(this.box, traces, design);
  }

  show(x) {
    const run = this.run, count = removed(run, x);
    if (count === this.count) return;
    this.count = count;
    const rows = [], z = [], text = [], parameters = count ? run.arrays.parameters[count - 1] : run.parameters[1];
    rows.push(["parameters", parameters, run.parameters[1], INK, whole(parameters)]);
    run.kinds.forEach((kind, i) => {
      const seen = picture(run, kind, count);
      const serving = run.arrays[`serves/${kind.name}`] ? followersOf(run, kind, count) : null;
      z.push(seen.z, null);
      text.push(null, seen.counts.map((live, site) => ` ${serving && groupsOf(run, kind) ? `${live} / ${serving[site].size}` : whole(live)}`));
      rows.push([kind.title, Math.max(...seen.counts), kind.size, KINDS[i], span(seen.counts)]);
      for (const follower of serving ? run.followers.filter((one) => one.follows === kind.name) : []) {
        const counts = serving.map((found) => found.size);
        rows.push([follower.title, Math.max(...counts), follower.size, DARKER[i], span(counts)]);
      }
    });
    this.meters.replaceChildren(...rows.flatMap(([name, value, of, color, shown]) => {
      const fill = element("i");
      fill.style.cssText = `width:${(100 * value) / of}%;background:${color}`;
      return [element("span", { textContent: name }), element("span", { textContent: `${shown} of ${whole(of)}` }), element("span", { className: "bar" }, fill)];
    }));
    const pictures = z.map((_, i) => i).filter((i) => i % 2 === 0), words = pictures.map((i) => i + 1);
    Plotly.restyle(this.plot, { z: pictures.map((i) => z[i]) }, pictures);
    Plotly.restyle(this.plot, { text: words.map((i) => text[i]) }, words);
  }
}

async function shapes(runs) {
  const made = section("The model’s shape", "Which of the source’s units are there: a row per layer, original numbers across, what left is blank; two shades tell apart heads that share one KV head from the next ones. Move the slider through the run (arrow keys, too).");
  const shown = element("div", { className: "when" }), slider = element("input", { type: "range", id: "when", min: 0, max: PLACES, value: PLACES, step: 1, ariaLabel: "when" });
  const button = (textContent, title, onclick) => element("button", { textContent, title, onclick, type: "button" });
  const grid = element("div", { className: runs.length > 1 ? "cells" : "" }), all = runs.map((run) => new Shape(grid, run, runs.length > 1));
  const pruned = runs.filter((run) => run.arrays.x.length), end = Math.max(0, ...pruned.map((run) => run.arrays.x[run.arrays.x.length - 1]));
  const isTokens = pruned.every((run) => run.xlabel === "training tokens");
  const go = (x, fromSlider) => {
    state.x = Math.min(Math.max(x, 0), end);
    if (!fromSlider) slider.value = end ? Math.round((state.x / end) * PLACES) : 0;
    if (!state.waits) { state.waits = true; requestAnimationFrame(() => { state.waits = false; all.forEach((shape) => shape.show(state.x)); }); }
    const counts = pruned.map((run) => { const n = removed(run, state.x); return `${pruned.length > 1 ? `${run.name}: ` : ""}${whole(n)} of ${whole(run.arrays.x.length)} groups gone${n ? ` (iteration ${whole(run.arrays.iteration[n - 1])})` : ""}`; });
    shown.textContent = `${isTokens ? "token" : "removal"} ${whole(state.x)} · ${counts.join(" · ")}`;
  };
  const next = () => Math.min(...pruned.map((run) => run.arrays.x[removed(run, state.x)] ?? Infinity));
  const before = () => Math.max(0, ...pruned.map((run) => { const now = run.arrays.x[removed(run, state.x) - 1]; let n = removed(run, state.x); while (n && run.arrays.x[n - 1] === now) n--; return n ? run.arrays.x[n - 1] : 0; }));
  let timer = null;
  const play = button("▶", "play", () => {
    if (timer) { clearInterval(timer); timer = null; play.textContent = "▶"; return; }
    if (state.x >= end) go(0);
    play.textContent = "❚❚";
    timer = setInterval(() => { go(state.x + end / 120); if (state.x >= end) play.click(); }, 60);
  });
  slider.oninput = () => go((slider.value / PLACES) * end, true);
  if (pruned.length) made.append(element("div", { className: "steer" }, play, button("‹", "the removal before", () => go(before())), slider, button("›", "the next removal", () => go(next() === Infinity ? end : next()))), shown);
  made.append(grid);
  for (const shape of all) { await shape.build(); }
  go(end);
  all.forEach((shape) => shape.show(state.x));
}

// All of it -----------------------------------------------------------------------------------------------------------

function prints() {
  const fit = (width) => figures.forEach((holder) => Plotly.relayout(holder, { width, autosize: !width }));
  window.addEventListener("beforeprint", () => fit(690));
  window.addEventListener("afterprint", () => fit(null));
}

async function main() {
  const wait = document.getElementById("wait");
  try {
    const [library, data] = await Promise.all([inflate("plotly"), inflate("data")]);
    document.head.append(element("script", { textContent: new TextDecoder().decode(library) }));
    const runs = unpack(data);
    wait.remove();
    head(runs);
    await shapes(runs);
    training(runs);
    pruning(runs);
    time(runs);
    stages(runs);
    evaluation(runs);
    settings(runs);
    checkpoints(runs);
    document.getElementById("page").append(element("footer", { textContent: `Written by megatron_prune ${runs[0].version}. Everything is in this file. Drag over a figure to look closer, double-click to go back; curves with very many points show the lowest and highest of each stretch.` }));
    prints();
    document.body.dataset.ready = String(Math.round(performance.now()));
  } catch (error) {
    wait.className = "failed";
    wait.textContent = `The report could not be drawn: ${error.message}`;
    throw error;
  }
}

main();
