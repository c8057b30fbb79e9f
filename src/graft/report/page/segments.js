/* A sample whose spans carry the numbers that led to their advantages: a table with a row for each segment. */
const SHORT_TEXT = 600;
let reasonsMade = 0;

const hasNumber = (node, name) => node.numbers !== undefined && Object.hasOwn(node.numbers, name);

/* Narrow columns: two decimals at most, more where nothing would be left. */
function shortNumber(value) {
  if (typeof value !== "number") return formatValue(value, "");
  const size = Math.abs(value), written = () => {
    if (Number.isInteger(value) && size < 1e5) return String(value);
    if (size >= 1e5 || size < 5e-4) return value.toExponential(0);
    if (size < 5e-3) return value.toPrecision(1);
    return String(Number(value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0)));
  };
  return written().replaceAll("-", "−");
}

/* The colour of an advantage: its sign, and its strength beside the largest. */
function tone(made, advantage, scale) {
  if (typeof advantage !== "number") return made;
  if (advantage !== 0) made.classList.add(advantage > 0 ? "positive" : "negative");
  made.style.setProperty("--strength", Math.min(1, Math.abs(advantage) / scale).toFixed(3));
  return made;
}

/* The sign and size of an advantage for eyes that do not tell the two colours apart. */
const advantageBar = () => html("span", "bar", html("i", ""));

function button(className, text, pressed) {
  const made = html("button", className, text);
  made.type = "button";
  made.addEventListener("click", pressed);
  return made;
}

const firstCharacters = (text, count) => text.slice(0, count).replace(/[\ud800-\udbff]$/, "");

/* Without the line breaks around it, which its block makes anyway. */
const ownLines = (text) => text.replace(/^\n+|\n+$/g, "");

const nothingToSee = (text) => html("span", "muted", text ? "(white space)" : "(empty)");

/* A text as the content of its block: whole, or its beginning and a button for the rest. */
function blockContent(text) {
  const shown = ownLines(text);
  if (!shown.trim()) return [nothingToSee(text)];
  if (shown.length <= 1.2 * SHORT_TEXT) return [shown];
  const part = html("span", "");
  const more = button("more", "", () => show(more.getAttribute("aria-expanded") !== "true"));
  const show = (whole) => {
    part.textContent = whole ? shown : `${firstCharacters(shown, SHORT_TEXT)}… `;
    more.textContent = whole ? "show less" : `show all ${shown.length.toLocaleString("en")} characters`;
    more.setAttribute("aria-expanded", String(whole));
  };
  show(false);
  return [part, more];
}

function textBlock(...content) {
  const block = html("div", "block", ...content);
  block.dir = "auto";
  return block;
}

/* Shown while the pointer rests on the segment or the keyboard on the button, and held open by pressing it. */
function reasonParts(reason) {
  if (!reason) return [];
  const tip = html("span", "tip", reason);
  tip.id = `reason-${++reasonsMade}`;
  tip.setAttribute("role", "tooltip");
  const why = button("why", "critic's reason", () => why.setAttribute("aria-expanded", String(why.getAttribute("aria-expanded") !== "true")));
  why.setAttribute("aria-expanded", "false");
  why.setAttribute("aria-describedby", tip.id);
  why.addEventListener("keydown", (event) => { if (event.key === "Escape") why.blur(); });
  return [why, tip];
}

function numberCell(segment, name) {
  const cell = html("td", name === "A" ? "number credit" : "number");
  cell.dataset.name = name;
  if (!hasNumber(segment, name)) return cell;
  const value = segment.numbers[name];
  cell.append(name === "A" && value > 0 ? "+" : "", shortNumber(value));
  if (name === "A") cell.append(advantageBar());
  return cell;
}

function segmentRow(segment, index, columns, scale) {
  const place = segment.kind === "answer" ? ["answer"] : [html("span", "name", `${segment.kind} `), String(index + 1)];
  const order = html("th", "order", ...place);
  order.scope = "row";
  const said = html("td", "said", textBlock(...blockContent(segment.text)), ...reasonParts(segment.reason));
  return tone(html("tr", "", order, said, ...columns.map(({ name }) => numberCell(segment, name))), segment.advantage, scale);
}

function columnHead(name, meaning, className) {
  const head = html("th", className, name);
  head.scope = "col";
  if (meaning) head.title = meaning.replaceAll("`", "");
  return head;
}

/* The scale of the colours is the sample's own: its largest advantage. */
function segmentTable(segments) {
  const columns = data.numbers.filter(({ name }) => segments.some((segment) => hasNumber(segment, name)));
  const scale = largestAdvantage([{ segments }]);
  const heads = [columnHead("#", "Thoughts in order, then the answer", "order"), columnHead("segment", "", "said"),
    ...columns.map(({ name, meaning }) => columnHead(name, meaning, name === "A" ? "number credit" : "number"))];
  return html("table", "segments", html("thead", "", html("tr", "", ...heads)),
    html("tbody", "", ...segments.map((segment, index) => segmentRow(segment, index, columns, scale))));
}
