"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

const withoutNegativeZero = (text) => text.replace(/^-(?=[0.]*$)/, "");

const formatShare = (value, digits) => `${withoutNegativeZero((100 * value).toFixed(digits))} %`;

/* Values for people, as format_value in text.py. */
function formatValue(value, unit) {
  if (typeof value === "string") return { Infinity: "∞", "-Infinity": "−∞" }[value] ?? value;
  if (unit === "share") return formatShare(value, 1);
  if (Number.isInteger(value) || Math.abs(value) >= 10000) return withoutNegativeZero(Math.round(value).toLocaleString("en"));
  return String(Number(value.toPrecision(4)));
}

function formatDuration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const padded = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}:${padded(whole % 60)}`;
  return `${Math.floor(minutes / 60)}:${padded(minutes % 60)}:${padded(whole % 60)}`;
}

function formatCount(count) {
  if (count >= 1e6) return `${Number((count / 1e6).toPrecision(3))} M`;
  return count >= 10000 ? `${Number((count / 1e3).toPrecision(3))} k` : count.toLocaleString("en");
}

const AXES = {
  step: { label: () => "step", tick: (x) => x.toLocaleString("en"), name: (x) => `step\u00a0${x.toLocaleString("en")}` },
  generated_tokens: { label: () => "generated tokens", tick: formatCount, name: (x) => `${x.toLocaleString("en")} tokens` },
  seconds: { label: (high) => (high < 3600 ? "time, min:s" : "time, h:min:s"), tick: formatDuration, name: formatDuration },
};
const MOMENTS = { before: "before", after_warm_start: "after warm start", during: "", after: "after" };
const TIME_STEPS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400];
const SMOOTH_FROM = 30;
const MARGIN = { top: 12, right: 12, bottom: 38 };
const COLOURS = ["", " second", " third"], DASHES = ["", " dashed", " dotted"];
const charts = [];
let chosenAxis = "step";

function element(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function html(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/* Classes of the lines of one chart: three colours, then the same dashed and dotted. */
const seriesClass = (index) => COLOURS[index % 3] + DASHES[Math.floor(index / 3) % 3];

const smallest = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const largest = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

function niceStep(span, count) {
  const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

function tickStep(axis, span, count) {
  if (axis === "seconds") return TIME_STEPS.find((step) => step >= span / count) ?? niceStep(span, count);
  return Math.max(1, niceStep(span, count));
}

function ticksBetween(low, high, step) {
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step + 0);
  return found;
}

/* Steps averaged in the thick lines: a twentieth of the run, 5 at least. */
const smoothingWidth = (count) => Math.max(5, Math.round(count / 20));

function runningMean(points, width) {
  let sum = 0;
  return points.map((point, index) => {
    sum += point.y - (index >= width ? points[index - width].y : 0);
    return { ...point, y: sum / Math.min(index + 1, width) };
  });
}

class Chart {
  constructor(figure, spec) {
    this.spec = spec;
    this.columns = data.columns[spec.stage];
    this.plot = figure.querySelector(".plot");
    this.readout = figure.querySelector(".readout");
    this.readout.classList.toggle("many", spec.metrics.length > COLOURS.length);
    this.isEvaluation = spec.stage === "evaluation";
    this.cursor = null;
    this.listen();
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.plot);
  }

  /* The warm start generates no tokens: its chart keeps the steps. */
  get axis() {
    return this.spec.stage === "warm_start" && chosenAxis === "generated_tokens" ? "step" : chosenAxis;
  }

  /* What was measured, NaN and infinities included (y is null for these). */
  points(name) {
    const xs = this.columns[this.axis];
    return (this.columns[name] ?? [])
      .map((value, index) => ({ index, value, x: xs[index], y: typeof value === "number" ? value : null }))
      .filter((point) => point.value !== null && point.x !== null);
  }

  xDomain() {
    const alone = this.spec.stage === "warm_start";
    const xs = (alone ? ["warm_start"] : ["train", "evaluation"])
      .flatMap((stage) => data.columns[stage]?.[this.axis] ?? []).filter((x) => x !== null);
    const low = alone ? smallest(xs) : 0, high = largest(xs);
    return low < high ? [low, high] : [low - 1, low + 1];
  }

  yDomain(series) {
    const values = series.flatMap((points) => points.map((point) => point.y)).filter((y) => y !== null);
    if (this.isEvaluation) values.push(...(this.columns.held_out_high ?? []).filter((y) => typeof y === "number"));
    const low = Math.min(0, smallest(values)), high = Math.max(largest(values), low);
    const step = niceStep(high > low ? high - low : 1, this.plot.clientHeight > 200 ? 5 : 4);
    const top = Number.isFinite(high) && high > low ? high + (high - low) * 0.04 : low + 1;
    return { low: Number.isFinite(low) ? low : 0, high: Number.isFinite(top) ? top : 1, step };
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    if (!width || !height) return;
    const series = this.spec.metrics.map((name) => this.points(name));
    const [xLow, xHigh] = this.xDomain(), y = this.yDomain(series);
    const yTicks = ticksBetween(y.low, y.high, y.step);
    const digits = Math.max(0, -Math.floor(Math.log10(100 * y.step) + 1e-9));
    const labels = yTicks.map((value) => (this.spec.unit === "share" ? formatShare(value, digits) : formatValue(Number(value.toPrecision(6)), this.spec.unit)));
    const left = 10 + 6.6 * Math.max(...labels.map((label) => label.length));
    this.toX = (x) => left + ((x - xLow) / (xHigh - xLow)) * (width - left - MARGIN.right);
    this.toY = (value) => height - MARGIN.bottom - ((value - y.low) / (y.high - y.low)) * (height - MARGIN.bottom - MARGIN.top);
    this.fromX = (pixels) => xLow + ((pixels - left) / (width - left - MARGIN.right)) * (xHigh - xLow);
    this.series = series;

    const svg = element("svg", { role: "img", tabindex: "0", "aria-label": this.describe(), viewBox: `0 0 ${width} ${height}` });
    yTicks.forEach((value, index) => {
      const at = this.toY(value);
      svg.append(element("line", { class: value === 0 ? "base" : "grid", x1: left, x2: width - MARGIN.right, y1: at, y2: at }));
      svg.append(element("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, labels[index]));
    });
    this.drawXAxis(svg, xLow, xHigh, left, width, height);
    this.isEvaluation ? this.drawEvaluations(svg, series[0]) : series.forEach((points, index) => this.drawSeries(svg, points, index));
    this.pointer = element("g", {});
    svg.append(this.pointer);
    this.plot.replaceChildren(svg);
    this.show(this.cursor);
  }

  drawXAxis(svg, low, high, left, width, height) {
    const step = tickStep(this.axis, high - low, Math.max(2, (width - left) / 70)), baseline = height - MARGIN.bottom + 17;
    for (const value of ticksBetween(low, high, step)) {
      const at = this.toX(value), edge = at > width - MARGIN.right - 14 ? "end" : at < left + 6 ? "start" : "middle";
      svg.append(element("text", { x: at, y: baseline, "text-anchor": edge }, AXES[this.axis].tick(value)));
    }
    svg.append(element("text", { x: width - MARGIN.right, y: height - 5, "text-anchor": "end" }, AXES[this.axis].label(high)));
  }

  path(points) {
    let pen = "M";
    return points.map((point) => {
      if (point.y === null) { pen = "M"; return ""; }
      const part = `${pen}${this.toX(point.x).toFixed(1)},${this.toY(point.y).toFixed(1)}`;
      pen = "L";
      return part;
    }).join("");
  }

  drawSeries(svg, points, index) {
    const own = seriesClass(index), finite = points.filter((point) => point.y !== null);
    const smooth = finite.length >= SMOOTH_FROM;
    svg.append(element("path", { class: `line${own}${smooth ? " raw" : ""}`, d: this.path(points) }));
    if (smooth) svg.append(element("path", { class: `line${own}`, d: this.path(runningMean(finite, smoothingWidth(finite.length))) }));
    else for (const point of finite) svg.append(element("circle", { class: `point${own}`, cx: this.toX(point.x), cy: this.toY(point.y), r: 2.4 }));
    this.drawBroken(svg, points);
  }

  /* A cross at the top for each value that is not finite. */
  drawBroken(svg, points) {
    for (const point of points.filter((each) => each.y === null)) {
      const x = this.toX(point.x), y = MARGIN.top;
      svg.append(element("path", { class: "broken", d: `M${x - 4},${y - 4}L${x + 4},${y + 4}M${x - 4},${y + 4}L${x + 4},${y - 4}` }));
    }
  }

  drawEvaluations(svg, points) {
    const { moment, held_out_low: lows = [], held_out_high: highs = [] } = this.columns;
    const warm = moment.includes("after_warm_start");
    const bounded = (point) => typeof lows[point.index] === "number" && typeof highs[point.index] === "number";
    const curve = points.filter((point) => !(warm && moment[point.index] === "before"));
    const banded = curve.filter(bounded);
    const edge = (ends) => (point) => `${this.toX(point.x).toFixed(1)},${this.toY(ends[point.index]).toFixed(1)}`;
    if (banded.length > 1) {
      svg.append(element("polygon", { class: "area", points: [...banded.map(edge(highs)), ...banded.map(edge(lows)).reverse()].join(" ") }));
    }
    svg.append(element("path", { class: "line", d: this.path(curve) }));
    for (const point of points.filter((each) => each.y !== null)) this.drawMark(svg, point, bounded(point) ? [lows[point.index], highs[point.index]] : null);
    this.drawBroken(svg, points);
  }

  drawMark(svg, point, interval) {
    const moment = this.columns.moment[point.index], x = this.toX(point.x), y = this.toY(point.y);
    if (moment === "during") {
      svg.append(element("circle", { class: "point", cx: x, cy: y, r: 3 }));
      return;
    }
    const group = element("g", { class: moment });
    if (interval) {
      const [low, high] = interval.map(this.toY);
      group.append(element("path", { class: "whisker", d: `M${x - 4},${low}h8M${x},${low}V${high}M${x - 4},${high}h8` }));
    }
    const last = moment === "after" && x > 90, below = moment === "before" ? 4 : 18;
    group.append(element("circle", { class: `mark ${moment}`, cx: x, cy: y, r: 5.5 }));
    group.append(element("text", { class: "name", x: last ? x - 10 : x + 10, y: y + below, "text-anchor": last ? "end" : "start" }, MOMENTS[moment]));
    svg.append(group);
  }

  describe() {
    const parts = this.spec.metrics.map((name) => {
      const points = this.points(name);
      if (!points.length) return `${name}: nothing measured`;
      const first = points[0], final = points.at(-1), named = (point) => `${formatValue(point.value, this.spec.unit)} at ${AXES[this.axis].name(point.x)}`;
      return `${name} from ${named(first)} to ${named(final)}, ${points.length} values`;
    });
    return `${this.spec.title}. ${parts.join("; ")}. Arrow keys move through the values.`;
  }

  /* The measured point nearest to x; without x the last one. */
  nearest(points, x) {
    if (x === null || !points.length) return points.at(-1);
    return points.reduce((best, point) => (Math.abs(point.x - x) < Math.abs(best.x - x) ? point : best));
  }

  show(x) {
    this.cursor = x;
    if (!this.series) return;
    this.pointer.replaceChildren();
    const found = this.series.map((points) => this.nearest(points, x));
    this.write(found);
    const lead = found.find(Boolean);
    if (x === null || !lead) return;
    const at = this.toX(lead.x);
    this.pointer.append(element("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top - 6, y2: this.plot.clientHeight - MARGIN.bottom }));
    for (const point of found) {
      if (point && point.y !== null) this.pointer.append(element("circle", { class: "cursor-dot", cx: this.toX(point.x), cy: this.toY(point.y), r: 4 }));
    }
  }

  write(found) {
    const lead = found.find(Boolean);
    if (!lead) return;
    const named = found.length > 1 || this.spec.labels[0] !== "";
    const values = found.map((point, index) => {
      if (!point) return "";
      const value = formatValue(point.value, this.spec.unit);
      return named ? `${this.spec.labels[index]} ${value}` : value;
    });
    const small = html("small", "");
    const keyed = (value, index) => html("span", "value", html("span", `key${seriesClass(index)}`), value);
    values.slice(1).forEach((value, index) => small.append(keyed(value, index + 1), " · "));
    small.append(this.isEvaluation ? this.interval(lead.index) : "", AXES[this.axis].name(lead.x));
    this.readout.replaceChildren(html("b", found.length > 1 ? "several" : "", found.length > 1 ? keyed(values[0], 0) : values[0]), small);
  }

  interval(index) {
    const { held_out_low: lows = [], held_out_high: highs = [], moment } = this.columns;
    const bounds = typeof lows[index] === "number" && typeof highs[index] === "number";
    const name = MOMENTS[moment[index]];
    return `${bounds ? `${formatValue(lows[index], "share").replace(" %", "")} to ${formatValue(highs[index], "share")} · ` : ""}${name ? `${name} · ` : ""}`;
  }

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      if (this.fromX) showEverywhere(this, this.fromX(event.clientX - this.plot.getBoundingClientRect().left));
    });
    this.plot.addEventListener("pointerleave", () => showEverywhere(this, null));
    this.plot.addEventListener("focusout", () => showEverywhere(this, null));
    this.plot.addEventListener("keydown", (event) => this.move(event));
  }

  move(event) {
    const points = this.series[0] ?? [];
    if (!points.length) return;
    const now = points.indexOf(this.nearest(points, this.cursor));
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: points.length - 1 }[event.key];
    if (event.key === "Escape") showEverywhere(this, null);
    if (to === undefined) return;
    event.preventDefault();
    showEverywhere(this, points[Math.max(0, Math.min(points.length - 1, to))].x);
    document.getElementById("announcer").textContent = `${this.spec.title}: ${this.readout.textContent}`;
  }
}

/* Charts with the same x axis move together; the warm start has its own. */
function showEverywhere(source, x) {
  for (const chart of charts) if ((chart.spec.stage === "warm_start") === (source.spec.stage === "warm_start")) chart.show(x);
}

document.querySelectorAll(".chart").forEach((figure, index) => charts.push(new Chart(figure, data.charts[index])));
document.querySelectorAll("input[name=axis]").forEach((input) => input.addEventListener("change", () => {
  chosenAxis = input.value;
  for (const chart of charts) { chart.cursor = null; chart.draw(); }
}));
