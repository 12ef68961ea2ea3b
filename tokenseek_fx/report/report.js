"use strict";
// Draws the report from the JSON in the page. Text of the run enters the page as text nodes only.

const run = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

// -- elements and figures -----------------------------------------------------------------------------------------

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes
  return node;
}
const make = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);
const section = (id, ...children) => document.getElementById(id).append(...children);
const note = (text) => make("p", { class: "note" }, text);
const known = (value) => value !== null && value !== undefined;

const plainNumber = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const number = (x) => (x !== 0 && Math.abs(x) < 1e-4 ? x.toExponential(2) : plainNumber.format(x));
const share = (x) => `${(100 * x).toFixed(1)} %`;
const seconds = (x) => `${number(x)} s`;
function bytes(x) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = x < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(x) / 10));
  return `${plainNumber.format(x / 2 ** (10 * power))} ${units[power]}`;
}

const values = (steps, name) => steps.map((step) => step[name]).filter(known);
const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
const largest = (list) => list.reduce((a, b) => Math.max(a, b));
const smallest = (list) => list.reduce((a, b) => Math.min(a, b));
const median = (list) => [...list].sort((a, b) => a - b)[list.length >> 1];
const lastTenth = (list) => list.slice(-Math.ceil(list.length / 10));

// -- summary ------------------------------------------------------------------------------------------------------

function tile(name, field, figure, format) {
  const [ours, plain] = [run.steps, run.plain].map((steps) => values(steps, field));
  if (!ours.length) return [];
  const beside = plain.length ? [make("span", {}, `all tokens: ${format(figure(plain))}`)] : [];
  return [make("div", { class: "tile" }, make("span", {}, name), make("b", {}, format(figure(ours))), ...beside)];
}

function summary() {
  const tiles = [
    ...tile("loss, mean of last tenth", "loss", (list) => mean(lastTenth(list)), number),
    ...tile("time per step, median", "seconds", median, seconds),
    ...tile("peak memory", "peak", largest, bytes),
    ...tile("tokens kept", "kept", mean, share),
    ...tile("labelled tokens kept", "labelled", mean, share),
    ...tile("overlap of visits", "overlap", mean, share),
  ];
  section("summary", tiles.length ? make("div", { class: "tiles" }, ...tiles) : note("No step figures were recorded."));
  const entries = Object.entries(run.settings);
  const settings = entries.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  if (settings.length) section("summary", make("h3", {}, "Settings"), make("dl", {}, ...settings));
}

// -- charts -------------------------------------------------------------------------------------------------------

const HEIGHT = 190;
const MARGIN = { left: 58, right: 10, top: 10, bottom: 22 };

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

/** Split the points into `buckets` ranges; keep at most two points of each, the lowest and the highest. */
function thinned(points, buckets) {
  if (points.length <= 2 * buckets) return points;
  const found = [];
  const size = points.length / buckets;
  for (let i = 0; i < buckets; i++) {
    const part = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    found.push(...(low[0] < high[0] ? [low, high] : low === high ? [low] : [high, low]));
  }
  return found;
}

function smoothed(points) {
  const width = Math.floor(points.length / 25);
  if (width < 2) return null;
  let sum = 0;
  return points.map(([x, y], i) => {
    sum += y - (i >= width ? points[i - width][1] : 0);
    return [x, sum / Math.min(i + 1, width)];
  });
}

/** A chart of curves or bars; `series`: [{name, kind, points: [[x, y], ...]}]. Arrow keys read it point by point. */
class Chart {
  constructor(title, series, format, { bars = false, place = (x) => `step ${x}`, zero = false, smooth = false } = {}) {
    Object.assign(this, { title, format, bars, place, zero, smooth, at: null });
    this.series = series.filter((each) => each.points.length);
    this.xs = [...new Set(this.series.flatMap((each) => each.points.map(([x]) => x)))].sort((a, b) => a - b);
    this.lookup = this.series.map((each) => new Map(each.points));
    this.readout = make("output", {});
    this.svg = draw("svg", { "aria-hidden": "true" });
    const named = this.series.length > 1 ? this.series : [];
    const keys = named.map((each) => make("span", { class: `key ${each.kind}` }, each.name));
    const caption = make("figcaption", {}, title, ...keys);
    const attributes = { tabindex: "0", role: "group", "aria-label": `${title}. Arrow keys read the values.` };
    this.figure = make("figure", attributes, caption, this.svg, this.readout);
    this.listen();
  }

  listen() {
    this.figure.addEventListener("keydown", (event) => this.key(event));
    this.figure.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("pointermove", (event) => this.show(this.nearest(event)));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    new ResizeObserver(() => this.redraw(Math.round(this.svg.parentNode.clientWidth - 26))).observe(this.figure);
  }

  key(event) {
    const last = this.xs.length - 1;
    const now = this.at ?? (event.key === "ArrowLeft" ? last + 1 : -1);
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.show(null);
    if (to === undefined) return;
    event.preventDefault();
    this.show(Math.min(last, Math.max(0, to)));
  }

  nearest(event) {
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    const distance = (i) => Math.abs(this.x(this.xs[i]) - x);
    return this.xs.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
  }

  redraw(width) {
    if (width === this.width || width < 60) return;
    this.width = width;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.scales();
    this.cross = draw("g");
    this.svg.replaceChildren(...this.axes(), ...this.series.flatMap((each) => this.shape(each)), this.cross);
    this.show(this.at);
  }

  scales() {
    const all = this.series.flatMap((each) => each.points.map(([, y]) => y));
    let [low, high] = [this.zero || this.bars ? 0 : smallest(all), largest(all)];
    if (high <= low) [low, high] = [low - (this.zero ? 0 : 0.5), Math.max(high, low) + 0.5];
    const [first, last] = [this.xs[0], this.xs[this.xs.length - 1]];
    const pad = this.bars ? 0.5 : last > first ? 0 : 1;
    const inner = this.width - MARGIN.left - MARGIN.right;
    this.range = { low, high, first: first - pad, last: last + pad };
    this.x = (x) => MARGIN.left + ((x - this.range.first) / (this.range.last - this.range.first)) * inner;
    this.y = (y) => HEIGHT - MARGIN.bottom - ((y - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  axes() {
    const { low, high, first, last } = this.range;
    const unit = this.format === bytes ? 1024 ** Math.floor(Math.log2(Math.max(1, high)) / 10) : 1;
    const rows = ticks(low / unit, high / unit, 4).map((y) => y * unit).flatMap((y) => [
      draw("path", { class: "axis", d: `M${MARGIN.left} ${this.y(y)}H${this.width - MARGIN.right}` }),
      draw("text", { x: MARGIN.left - 6, y: this.y(y) + 4, "text-anchor": "end" }, this.format(y)),
    ]);
    const inside = (x) => Number.isInteger(x) && x >= this.xs[0] && x <= this.xs[this.xs.length - 1];
    const whole = ticks(first, last, Math.max(2, this.width / 90)).filter(inside);
    const text = (x, anchor, words) => draw("text", { x: this.x(x), y: HEIGHT - 6, "text-anchor": anchor }, words);
    const columns = this.bars
      ? [text(first, "start", "start"), text(last, "end", "end of the sequence")]
      : whole.map((x) => text(x, "middle", String(x)));
    return [...rows, ...columns];
  }

  shape({ kind, points }) {
    if (this.bars) return points.map((point) => this.bar(point));
    if (points.length === 1) {
      const [[x, y]] = points;
      return [draw("circle", { class: `point ${kind}`, cx: this.x(x), cy: this.y(y), r: 3 })];
    }
    const move = ([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
    const path = (list, classes) => draw("path", { class: classes, d: thinned(list, this.width).map(move).join("") });
    const flat = this.smooth ? smoothed(points) : null;
    return flat ? [path(points, `curve raw ${kind}`), path(flat, `curve ${kind}`)] : [path(points, `curve ${kind}`)];
  }

  bar([x, y]) {
    const [left, right] = [this.x(x - 0.45), this.x(x + 0.45)];
    return draw("rect", { class: "bar", x: left, width: right - left, y: this.y(y), height: this.y(0) - this.y(y) });
  }

  show(at) {
    this.at = at;
    this.svg.querySelectorAll(".bar").forEach((bar, i) => bar.classList.toggle("there", i === at));
    this.cross?.replaceChildren();
    if (at === null) return this.readout.replaceChildren();
    const x = this.xs[at];
    const there = this.series.map((each, i) => [each, this.lookup[i].get(x)]).filter(([, y]) => known(y));
    if (!this.bars && this.cross) {
      const line = draw("path", { class: "cross", d: `M${this.x(x)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}` });
      const point = ([each, y]) => draw("circle", { class: `point ${each.kind}`, cx: this.x(x), cy: this.y(y), r: 4 });
      this.cross.append(line, ...there.map(point));
    }
    const many = this.series.length > 1;
    const read = there.map(([each, y]) => (many ? `${each.name} ` : "") + this.format(y));
    this.readout.replaceChildren(`${this.place(x)}: ${read.join(", ")}`);
  }
}

const curve = (name, kind, steps, field) => {
  const points = steps.filter((s) => known(s[field])).map((s) => [s.step, s[field]]);
  return { name, kind, points };
};
const both = (field) => [curve("tokenseek", "ours", run.steps, field), curve("all tokens", "plain", run.plain, field)];

function charts(id, list, otherwise) {
  const there = list.filter((chart) => chart.series.length);
  section(id, there.length ? make("div", { class: "charts" }, ...there.map((chart) => chart.figure)) : note(otherwise));
}

// -- tokens -------------------------------------------------------------------------------------------------------

const CHANNELS = {
  scores: "combined score",
  attention: "attention received",
  gradient: "gradient",
  loss: "loss",
  labelled: "labelled",
  kept: "kept only",
};
const CHUNK = 192;
const CONTROLS = "\\u0000-\\u0009\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e";
const STRANGE = new RegExp(`[${CONTROLS}\\u2060-\\u206f\\ufeff\\ud800-\\udfff\\ufff9-\\ufffb]`, "gu");
const code = (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`;

/** The text shown for a token: characters that are invisible or change the text direction become their codes. */
function visible(token) {
  if (token === "") return "∅";
  return token.replace(STRANGE, (c) => (c === "\t" ? "→\t" : code(c))).replace(/\n/g, "↵\n");
}

/** Ranges [first, end) of about CHUNK tokens each, cut at the end of a line if one is near. */
function chunked(tokens) {
  const found = [];
  for (let first = 0, i = 1; first < tokens.length; i++) {
    const line = i - first >= CHUNK && tokens[i - 1].includes("\n");
    if (line || i - first >= 1.5 * CHUNK || i === tokens.length) {
      found.push([first, i]);
      first = i;
    }
  }
  return found;
}

/** The level, 0 to 10, of each value, by rank or by size. */
function levels(list, byRank) {
  if (typeof list.find(known) === "boolean") return list.map((x) => (x ? 6 : 0));
  const sorted = list.filter(known).sort((a, b) => a - b);
  const [low, high] = [sorted[0], sorted[sorted.length - 1]];
  const places = new Map(sorted.map((x, i) => [x, i])); // of equal values the last counts
  const place = (x) => (byRank ? (places.get(x) + 1) / sorted.length : (x - low) / (high - low));
  return list.map((x) => (known(x) && high > low ? Math.round(10 * place(x)) : 0));
}

class TokenMap {
  constructor(examples) {
    Object.assign(this, { examples, channel: null, byRank: true, active: null });
    this.box = make("div", {
      class: "map",
      tabindex: "0",
      role: "listbox",
      "aria-multiselectable": "true",
      "aria-label": "Tokens. Arrow keys move, N and P go to the next and previous kept token.",
    });
    this.tip = make("div", { class: "tip", role: "tooltip", id: "tip", hidden: "" });
    this.words = note("");
    this.channels = make("fieldset", {});
    const margin = { root: this.box, rootMargin: "800px 0px" };
    this.observer = new IntersectionObserver((seen) => this.scrolled(seen), margin);
    section("tokens", this.controls(), this.words, this.box, this.tip);
    this.listen();
    this.choose(0);
  }

  controls() {
    const options = this.examples.map((each, i) => make("option", { value: i }, `step ${each.step}: ${each.name}`));
    this.select = make("select", {}, ...options);
    this.select.addEventListener("change", () => this.choose(Number(this.select.value)));
    const recolour = (name) => this.colour(this.channel, name === "rank");
    const scale = radios("scale", "colour by", { rank: "rank", value: "value" }, "rank", recolour);
    const dim = make("input", { type: "checkbox", id: "dim" });
    dim.addEventListener("change", () => this.box.classList.toggle("dim", dim.checked));
    const steps = Array.from({ length: 11 }, (_, i) => make("i", { class: `h${i}` }));
    const example = make("label", {}, "example ", this.select);
    const dimmed = make("label", {}, dim, " dim tokens that were not kept");
    const legend = make("span", { class: "scale" }, "low\u00a0\u00a0\u00a0", ...steps, "high; kept: bold, underlined");
    return make("div", { class: "controls" }, example, this.channels, scale, dimmed, legend);
  }

  listen() {
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("pointermove", (event) => this.point(event.target.closest(".token")));
    this.box.addEventListener("pointerleave", () => this.point(null));
    this.box.addEventListener("click", (event) => {
      const token = event.target.closest(".token");
      if (token) this.go(Number(token.dataset.i));
    });
    // not on focus by pointer: the token under it would scroll away
    this.box.addEventListener("focus", () => this.box.matches(":focus-visible") && this.go(this.active ?? 0));
    this.box.addEventListener("blur", () => (this.tip.hidden = true));
    this.box.addEventListener("scroll", () => this.point(null), { passive: true });
    new ResizeObserver(() => this.reserve()).observe(this.box);
    window.addEventListener("beforeprint", () => this.chunks.forEach((_, i) => this.fill(i)));
  }

  choose(i) {
    this.example = this.examples[i];
    this.kept = new Set(this.example.kept);
    this.tokens = this.example.tokens.map(visible);
    this.chunks = chunked(this.example.tokens);
    this.active = null;
    this.tip.hidden = true;
    this.observer.disconnect();
    const attributes = { class: "chunk", role: "presentation" };
    this.parts = this.chunks.map(([first], k) => make("div", { ...attributes, "data-first": first, "data-k": k }));
    this.box.replaceChildren(...this.parts);
    this.box.scrollTop = 0;
    this.box.removeAttribute("aria-activedescendant");
    this.reserve();
    const there = Object.entries(CHANNELS).filter(([name]) => known(this.example[name]));
    const wanted = there.some(([name]) => name === this.channel) ? this.channel : there[0][0];
    const recolour = (name) => this.colour(name, this.byRank);
    this.channels.replaceChildren(...radios("channel", "show", Object.fromEntries(there), wanted, recolour).childNodes);
    this.colour(wanted, this.byRank);
    this.parts.forEach((part) => this.observer.observe(part));
    this.words.replaceChildren(this.described());
  }

  described() {
    const { tokens, kept, labelled } = this.example;
    const ratio = tokens.length ? kept.length / tokens.length : 0;
    const text = `Kept ${kept.length} of ${tokens.length} tokens (${share(ratio)})`;
    if (!labelled) return `${text}.`;
    const all = labelled.filter(Boolean).length;
    return `${text}, ${[...this.kept].filter((i) => labelled[i]).length} of ${all} labelled tokens.`;
  }

  /** Reserve height for the chunks that are not filled, estimated from their text. */
  reserve() {
    const perLine = Math.max(10, (this.box.clientWidth - 95) / 8.5);
    this.parts?.forEach((part, k) => {
      if (part.childNodes.length) return;
      const text = this.tokens.slice(...this.chunks[k]).join("");
      const rows = text.split("\n").map((line) => Math.max(1, Math.ceil(line.length / perLine)));
      part.style.minHeight = `${24 * rows.reduce((a, b) => a + b, 0)}px`;
    });
  }

  scrolled(seen) {
    const here = this.active === null ? -1 : this.chunkOf(this.active);
    for (const { target, isIntersecting } of seen) {
      const k = Number(target.dataset.k);
      if (isIntersecting) this.fill(k);
      else if (k !== here && target.childNodes.length) {
        target.style.minHeight = `${target.offsetHeight}px`;
        target.replaceChildren();
      }
    }
  }

  fill(k) {
    const part = this.parts[k];
    if (part.childNodes.length) return;
    const [first, end] = this.chunks[k];
    const count = this.tokens.length;
    for (let i = first; i < end; i++) {
      const aria = { "aria-selected": this.kept.has(i), "aria-posinset": i + 1, "aria-setsize": count };
      const attributes = { class: this.look(i), id: `t${i}`, role: "option", ...aria, "data-i": i };
      part.append(make("span", attributes, this.tokens[i]));
    }
    part.style.minHeight = "";
  }

  look(i) {
    const made = this.example.tokens[i] === "" ? " made" : "";
    return `token h${this.levels[i]}${this.kept.has(i) ? " kept" : ""}${made}${i === this.active ? " active" : ""}`;
  }

  colour(channel, byRank) {
    Object.assign(this, { channel, byRank });
    this.levels = channel === "kept" ? this.tokens.map(() => 0) : levels(this.example[channel], byRank);
    this.box.querySelectorAll(".token").forEach((token) => (token.className = this.look(Number(token.dataset.i))));
  }

  chunkOf(i) {
    return this.chunks.findIndex(([, end]) => i < end);
  }

  token(i) {
    this.fill(this.chunkOf(i));
    return document.getElementById(`t${i}`);
  }

  go(i) {
    if (!this.tokens.length) return;
    const to = Math.min(this.tokens.length - 1, Math.max(0, i));
    this.box.querySelector(".active")?.classList.remove("active");
    this.active = to;
    const token = this.token(to);
    token.classList.add("active");
    token.scrollIntoView({ block: "nearest" });
    this.box.setAttribute("aria-activedescendant", token.id);
    this.point(token);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const now = this.active ?? 0;
    const moves = {
      ArrowRight: () => now + 1,
      ArrowLeft: () => now - 1,
      ArrowDown: () => this.line(now, 1),
      ArrowUp: () => this.line(now, -1),
      PageDown: () => now + CHUNK,
      PageUp: () => now - CHUNK,
      Home: () => 0,
      End: () => this.tokens.length - 1,
      n: () => this.example.kept.find((i) => i > now) ?? now,
      p: () => this.example.kept.findLast((i) => i < now) ?? now,
    };
    if (event.key === "Escape") this.tip.hidden = true;
    const move = moves[event.key] ?? moves[event.key.toLowerCase()];
    if (!move) return;
    event.preventDefault();
    this.go(move());
  }

  /** The nearest token in the line above or below. */
  line(from, direction) {
    const start = this.token(from).getClientRects()[0];
    const distance = (box) => Math.abs(box.left - start.left);
    let best = from;
    let line = null;
    for (let i = from + direction; i >= 0 && i < this.tokens.length; i += direction) {
      const box = this.token(i).getClientRects()[0];
      if (!box || Math.abs(box.top - start.top) < 8) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) >= 8) break;
      if (best === from || distance(box) < distance(this.token(best).getClientRects()[0])) best = i;
    }
    return best;
  }

  point(token) {
    if (!token && document.activeElement === this.box && this.active !== null) {
      token = document.getElementById(`t${this.active}`);
    }
    this.tip.hidden = !token;
    if (!token) return;
    const i = Number(token.dataset.i);
    const place = ` token ${i + 1} of ${this.tokens.length}, ${this.kept.has(i) ? "kept" : "not kept"}`;
    this.tip.replaceChildren(make("b", {}, visible(this.example.tokens[i])), place, this.table(i));
    token.setAttribute("aria-describedby", "tip");
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.tip;
    const below = box.bottom + 8 + offsetHeight < window.innerHeight;
    this.tip.style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - offsetWidth - 8))}px`;
    this.tip.style.top = `${below ? box.bottom + 8 : box.top - offsetHeight - 8}px`;
  }

  table(i) {
    const there = Object.entries(CHANNELS).filter(([name]) => name !== "kept" && this.example[name]);
    const cell = (text) => make("td", {}, text);
    const rows = there.map(([name, title]) => make("tr", {}, cell(title), cell(told(this.example[name], i))));
    return make("table", {}, ...rows);
  }
}

/** The value of a token and its rank. */
function told(list, i) {
  if (!known(list[i])) return "none";
  if (typeof list[i] === "boolean") return list[i] ? "yes" : "no";
  return `${number(list[i])}, rank ${1 + list.filter((x) => known(x) && x > list[i]).length}`;
}

function radios(name, legend, choices, chosen, change) {
  const labels = Object.entries(choices).map(([value, text]) => {
    const input = make("input", { type: "radio", name, value });
    input.checked = value === chosen;
    input.addEventListener("change", () => change(value));
    return make("label", {}, input, ` ${text}`);
  });
  return make("fieldset", {}, make("legend", {}, legend), ...labels);
}

// -- memory -------------------------------------------------------------------------------------------------------

function memory() {
  const peaks = new Chart("Peak memory per step", both("peak"), bytes, { zero: true });
  charts("memory", [peaks], "Peak memory was not recorded.");
  const ways = Object.entries(run.memory);
  if (!ways.length) return section("memory", note("The memory split was not recorded."));
  const parts = [...new Set(ways.flatMap(([, split]) => Object.keys(split)))];
  const total = (split) => Object.values(split).reduce((a, b) => a + b, 0);
  const most = Math.max(1, ...ways.map(([, split]) => total(split)));
  const pieces = (split) => parts.map((part, k) => piece(part, k, split[part] ?? 0, most));
  const bars = ways.flatMap(([way, split]) => [make("span", {}, way), make("div", {}, ...pieces(split))]);
  const row = (name, figures, attributes = {}) =>
    make("tr", attributes, make("td", {}, ...name), ...figures.map((x) => make("td", {}, bytes(x))));
  const heading = (text) => make("th", { scope: "col" }, text);
  const head = make("tr", {}, heading("part"), ...ways.map(([way]) => heading(way)));
  const swatch = (k) => make("i", { class: `swatch part-${k % 6}` });
  const sizes = (part) => ways.map(([, split]) => split[part] ?? 0);
  const rows = parts.map((part, k) => row([swatch(k), part], sizes(part)));
  const sum = row(["total"], ways.map(([, split]) => total(split)), { class: "total" });
  section(
    "memory",
    make("h3", {}, "Split"),
    note("Activations, logits, keys and values: saved between forward and backward."),
    make("div", { class: "stack", "aria-hidden": "true" }, ...bars),
    make("div", { class: "scroll" }, make("table", {}, head, ...rows, sum)),
  );
}

function piece(part, k, size, most) {
  const bar = make("i", { class: `part-${k % 6}`, title: `${part}: ${bytes(size)}` });
  bar.style.width = `${(100 * size) / most}%`;
  return bar;
}

// -- graph --------------------------------------------------------------------------------------------------------

const KINDS = { rows: "of-rows", "keys/values": "of-kv", scoring: "of-choice", select: "of-choice", seek: "of-all" };
const LEGEND = {
  "of-all": "all tokens, no gradient",
  "of-choice": "scoring and selection",
  "of-kv": "keys and values",
  "of-rows": "kept rows",
  gather: "gather or scatter of rows",
  barrier: "barrier: runs over all tokens",
};

function graphLine(text) {
  const remark = text.includes("  # ") ? text.slice(text.lastIndexOf("  # ") + 4) : "";
  const moved = / = (\w+\.)?(gather|index_select|take_along_dim|scatter\w*|index_put\w*)\(/.test(text);
  const kind = remark.startsWith("barrier") ? "barrier" : KINDS[remark] ?? "";
  return make("div", { class: `${kind}${moved ? " gather" : ""}` }, text);
}

function graphBlock(text) {
  const [title, ...lines] = text.split("\n");
  const pre = make("pre", { tabindex: "0", "aria-label": title });
  const details = make("details", {}, make("summary", {}, title), pre);
  const fill = () => pre.append(...lines.map(graphLine));
  details.addEventListener("toggle", () => details.open && !pre.childNodes.length && fill());
  return details;
}

function graph() {
  if (!run.graphs.length) return section("graph", note("The graph was not recorded."));
  const blocks = run.graphs.map(graphBlock);
  const every = (text, open) => {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", () => blocks.forEach((block) => (block.open = open)));
    return button;
  };
  const marked = make("input", { type: "checkbox", id: "marked" });
  const mark = (block) => block.querySelector("pre").classList.toggle("marked", marked.checked);
  marked.addEventListener("change", () => blocks.forEach(mark));
  const legend = Object.entries(LEGEND).map(([kind, text]) => make("span", { class: kind }, text));
  const only = make("label", {}, marked, " only gathers and barriers");
  const controls = make("div", { class: "controls buttons" }, every("open all", true), every("close all", false), only);
  section("graph", make("div", { class: "legend" }, ...legend), controls, ...blocks);
}

// -- the page -----------------------------------------------------------------------------------------------------

function report() {
  document.title = run.title;
  document.getElementById("title").textContent = run.title;
  summary();
  const losses = new Chart("Training loss", both("loss"), number, { smooth: true });
  const times = new Chart("Time per step", both("seconds"), seconds, { zero: true });
  charts("loss", [losses, times], "Neither loss nor time was recorded.");
  if (run.examples.length) new TokenMap(run.examples);
  else section("tokens", note("No examples were recorded."));
  const options = { zero: true };
  const bars = { bars: true, place: (i) => `${share(i / run.positions.length)} of the sequence` };
  const positions = { name: "kept", kind: "ours", points: run.positions.map((y, i) => [i, y]) };
  charts("statistics", [
    new Chart("Tokens kept", [curve("kept", "ours", run.steps, "kept")], share, options),
    new Chart("Labelled tokens kept", [curve("labelled", "ours", run.steps, "labelled")], share, options),
    new Chart("Overlap with the previous visit", [curve("overlap", "ours", run.steps, "overlap")], share, options),
    new Chart("Kept tokens by position", [positions], share, bars),
  ], "Statistics were not recorded.");
  memory();
  graph();
}

report();
