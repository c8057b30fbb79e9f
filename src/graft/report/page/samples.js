/* Samples: every text comes into the page as text, never as markup. */
function isSolved(sample) {
  return sample.score !== null && sample.score >= data.threshold - 1e-9; // as `reaches` in types.py
}

function kindOf(sample) {
  if (sample.score === null) return "unscored";
  return isSolved(sample) ? "solved" : "unsolved";
}

function verdict(sample) {
  const kind = kindOf(sample);
  const words = { solved: "✓ right", unsolved: "✗ wrong", unscored: `no score: ${sample.outcome.replaceAll("_", " ")}` }[kind];
  return html("span", `verdict ${kind}`, kind === "unscored" ? words : `${words}, ${formatValue(sample.score, "score")}`);
}

const signed = (value) => (typeof value !== "number") ? formatValue(value, "") : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(2)}`;

function largestAdvantage(samples) {
  const advantages = samples.flatMap((sample) => sample.segments.map((segment) => segment.advantage));
  return largest([1e-9, ...advantages.filter(Number.isFinite).map(Math.abs)]);
}

function segmentSpan(segment, scale) {
  const span = html("span", "segment", segment.text);
  if (segment.advantage === null) return span;
  span.title = `advantage ${signed(segment.advantage)}`;
  return tone(span, segment.advantage, scale);
}

function describeAdvantage(segments) {
  const trained = segments.map((segment) => segment.advantage).filter((advantage) => advantage !== null);
  if (!trained.length) return "not trained";
  const low = smallest(trained), high = largest(trained);
  return low === high ? `advantage ${signed(low)}` : `advantages ${signed(low)} to ${signed(high)}`;
}

/* Of a sample all of whose segments were pushed the same way. */
function sideColour(advantages) {
  const low = smallest(advantages), high = largest(advantages);
  if (low >= 0 && high > 0) return "var(--good)";
  return high <= 0 && low < 0 ? "var(--bad)" : null;
}

/* The samples of a prompt of training: of each the spans on the way to its leaf. */
function samplesOf(prompt) {
  prompt.samples ??= prompt.leaves.map((leaf) => {
    const segments = [];
    for (let node = prompt.nodes[leaf]; node; node = prompt.nodes[node.parent]) segments.unshift(node);
    const tokens = segments.reduce((sum, segment) => sum + segment.tokens, 0), { grade, critique, stop = null } = segments.at(-1);
    return { ...grade, segments, tokens, stop, critique };
  });
  return prompt.samples;
}

function sampleText(segments, scale) {
  const text = html("p", "text", ...segments.map((segment) => segmentSpan(segment, scale)));
  text.dir = "auto";
  if (!segments.some((segment) => segment.text)) text.append(html("span", "muted", "(empty)"));
  return text;
}

/* What the critic says of the whole completion. */
function critiqueFacts(critique) {
  if (!critique) return [];
  if (critique.outcome !== "graded") return [html("span", "warning", `critic: ${critique.outcome.replaceAll("_", " ")}`)];
  return critique.overall === null ? [] : [html("span", "", `overall score ${shortNumber(critique.overall)}`)];
}

const critiqueProblem = (critique) => (critique?.problem ? [html("p", "reason", `Critic: ${critique.problem}`)] : []);

/* What each part of the grader gave, where it has some. */
function gradeParts(grade) {
  const parts = Object.entries(grade?.parts ?? {});
  return parts.length ? [html("p", "parts", ...parts.map(([name, value]) => html("span", "", html("i", "", name), ` ${shortNumber(value)}`)))] : [];
}

function sampleCard(sample, scale, when) {
  const header = html("header", "");
  if (when) header.append(html("span", "when", when));
  header.append(verdict(sample));
  if (sample.outcome === "unparseable") header.append(html("span", "warning", "unparseable"));
  if (!when) header.append(html("span", "", describeAdvantage(sample.segments)));
  header.append(html("span", "", `${sample.tokens.toLocaleString("en")} tokens`));
  if (sample.stop === "length") header.append(html("span", "warning", "truncated"));
  header.append(...critiqueFacts(sample.critique));
  const credited = sample.segments.some((segment) => segment.numbers);
  const card = html("article", credited ? "sample credited" : "sample", header,
    credited ? segmentTable(sample.segments) : sampleText(sample.segments, scale), ...critiqueProblem(sample.critique));
  card.append(...gradeParts(sample));
  if (sample.reason) card.append(html("p", "reason", sample.reason));
  const side = sideColour(sample.segments.map((segment) => segment.advantage ?? 0));
  if (side) card.style.setProperty("--side", side);
  return card;
}

function messageList(asked) {
  const list = html("div", "messages");
  const add = (name, text) => {
    const content = html("div", "", text);
    content.dir = "auto";
    list.append(html("div", "message", html("span", "", name), content));
  };
  for (const message of asked.messages) add(message.role, message.text);
  for (const [key, value] of Object.entries(asked.item)) if (value) add(key, value);
  return list;
}

function foldable(asked, mark, content, open) {
  const question = html("span", "question", asked.messages.at(-1)?.text.replace(/\s+/g, " ") ?? "");
  question.dir = "auto";
  const details = html("details", "prompt card", html("summary", "", mark, html("span", "row", `row ${asked.row}`), question));
  const fill = () => { if (details.open && !details.querySelector(".body")) details.append(html("div", "body", messageList(asked), content())); };
  details.addEventListener("toggle", fill);
  details.open = open;
  fill();
  return details;
}

function strip(samples) {
  const bar = html("span", "strip", ...samples.map((sample) => html("i", kindOf(sample))));
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `${samples.filter(isSolved).length} of ${samples.length} right`);
  bar.title = bar.getAttribute("aria-label");
  return bar;
}

function promptCard(prompt, open) {
  const samples = samplesOf(prompt);
  return foldable(prompt, strip(samples), () => {
    const scale = largestAdvantage(samples);
    const content = html("div", "", html("div", "samples", ...samples.map((sample) => sampleCard(sample, scale))));
    if (prompt.drawn !== samples.length) content.append(html("p", "note", `${samples.length} of ${prompt.drawn} samples of this prompt are shown.`));
    content.append(button("plain to-tree", "Show as a tree", () => askForTree(prompt)));
    return content;
  }, open);
}

function startSteps() {
  const slider = document.getElementById("step-slider");
  if (!slider) return;
  const place = document.getElementById("step-samples"), name = document.getElementById("step-name");
  const about = document.getElementById("step-about"), back = document.getElementById("step-back"), next = document.getElementById("step-next");
  const show = () => {
    const chosen = data.steps[Number(slider.value)];
    const samples = chosen.prompts.flatMap(samplesOf);
    name.textContent = `Step ${chosen.step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", name.textContent);
    about.textContent = `${samples.filter(isSolved).length} of the ${samples.length} samples shown are right · `
      + `${chosen.prompts.length} ${chosen.prompts.length === 1 ? "prompt" : "prompts"}`;
    back.disabled = Number(slider.value) === 0;
    next.disabled = Number(slider.value) === data.steps.length - 1;
    place.replaceChildren(...chosen.prompts.map((prompt, index) => promptCard(prompt, index === 0)));
  };
  const go = (by) => () => { slider.value = Number(slider.value) + by; show(); };
  slider.addEventListener("input", show);
  back.addEventListener("click", go(-1));
  next.addEventListener("click", go(1));
  show();
}

const CHANGES = {
  gained: { mark: "✗ → ✓", is: (was, now) => !was && now },
  unsolved: { mark: "✗ → ✗", is: (was, now) => !was && !now },
  lost: { mark: "✓ → ✗", is: (was, now) => was && !now },
  kept: { mark: "✓ → ✓", is: (was, now) => was && now },
};

function changeOf(pair) {
  const was = isSolved(pair.before), now = isSolved(pair.after);
  return Object.keys(CHANGES).find((name) => CHANGES[name].is(was, now));
}

function pairCard(pair, open) {
  const change = changeOf(pair);
  const mark = html("span", `change verdict ${isSolved(pair.after) ? "solved" : "unsolved"}`, CHANGES[change].mark);
  return foldable(pair, mark, () => html("div", "samples two", sampleCard(pair.before, 1, "Before"), sampleCard(pair.after, 1, "After")), open);
}

function startPairs() {
  const place = document.getElementById("pair-list");
  if (!place) return;
  const buttons = [...document.querySelectorAll("[data-change]")];
  const show = (change) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.change === change));
    const chosen = data.pairs.filter((pair) => change === "all" || changeOf(pair) === change);
    place.replaceChildren(...chosen.map((pair, index) => pairCard(pair, index < 2)));
  };
  for (const button of buttons) {
    const count = data.pairs.filter((pair) => button.dataset.change === "all" || changeOf(pair) === button.dataset.change).length;
    button.append(` ${count}`);
    button.disabled = count === 0;
    button.addEventListener("click", () => show(button.dataset.change));
  }
  show("all");
}

startPairs();
startSteps();
