/* One prompt as a tree: spans below the span that they continue, spans drawn from one state in a bracket. */
const LINES_AT_FIRST = 40;
const NOT_GRADED = "not graded";
const INDENTED_LEVELS = 8;
const NUMBERS_IN_LINE = ["S", "P", "value"];

/* Of each node the ids of those that continue it; of the prompt as the second. */
function childrenOf(nodes) {
  const below = nodes.map(() => []), top = [];
  nodes.forEach((node, id) => (node.parent < 0 ? top : below[node.parent]).push(id));
  return [below, top];
}

const isScored = (node) => node.grade !== undefined && node.grade.score !== null;

function shareRight(right, leaves) {
  if (leaves > 1) return `${right} of ${leaves} right`;
  return leaves ? (right ? "right" : "wrong") : "";
}

class TreeView {
  constructor(prompt) {
    this.nodes = prompt.nodes;
    [this.below, this.top] = childrenOf(prompt.nodes);
    this.survivors = new Set(prompt.survivors);
    this.columns = data.numbers.filter(({ name }) => NUMBERS_IN_LINE.includes(name) && this.nodes.some((node) => hasNumber(node, name)));
    this.scale = largestAdvantage([{ segments: this.nodes }]);
    this.countLeaves();
    this.items = [];
    this.list = html("div", "tree-items", ...this.families(this.top, null, 1));
    this.list.setAttribute("role", "tree");
    this.list.setAttribute("aria-labelledby", "tree-title");
    this.element = html("div", "tree card", messageList(prompt), this.names(), this.list);
    this.element.style.setProperty("--columns", this.columns.map(() => "3rem").join(" "));
    this.unfoldFirst();
    this.current = this.list.querySelector(".item");
    this.current.tabIndex = 0;
    this.list.addEventListener("click", (event) => this.click(event));
    this.list.addEventListener("keydown", (event) => this.key(event));
  }

  /* Below each node: leaves that have a score, those of them that are right, and all spans. */
  countLeaves() {
    this.counts = this.nodes.map((node) => ({ leaves: Number(isScored(node)), right: Number(isScored(node) && isSolved(node.grade)), spans: 0 }));
    for (let id = this.nodes.length - 1; id >= 0; id--) {
      const own = this.counts[id], above = this.counts[this.nodes[id].parent];
      if (!above) continue;
      above.leaves += own.leaves;
      above.right += own.right;
      above.spans += own.spans + 1;
    }
  }

  /* The children of one node, group by group. A span alone that keeps its parent's group continues it: no bracket.
     The member that was gone on from comes last, so that the others stand together above what followed. */
  families(ids, parent, level) {
    const groups = Map.groupBy(ids, (id) => this.nodes[id].group);
    return [...groups].flatMap(([group, members]) => {
      const ordered = [false, true].flatMap((survived) => members.filter((id) => this.survivors.has(id) === survived));
      const items = ordered.map((id) => this.item(id, level));
      if (parent !== null && members.length === 1 && this.nodes[parent].group === group) return items;
      const bracket = html("div", level > INDENTED_LEVELS ? "siblings deep" : "siblings", html("div", "about", `group of ${members.length}`), ...items);
      bracket.setAttribute("role", "group");
      bracket.setAttribute("aria-label", `group of ${members.length}`);
      return [bracket];
    });
  }

  item(id, level) {
    const line = this.line(id, level), made = html("div", "item", line);
    line.id = `tree-line-${id}`;
    made.setAttribute("role", "treeitem");
    made.setAttribute("aria-level", String(level));
    made.setAttribute("aria-labelledby", line.id);
    made.tabIndex = -1;
    made.dataset.node = String(id);
    this.items[id] = made;
    if (this.survivors.has(id)) made.classList.add("survived");
    if (this.below[id].length) {
      const children = html("div", "children", ...this.families(this.below[id], id, level + 1));
      children.setAttribute("role", "group");
      made.append(children);
      this.fold(made, true);
    }
    return made;
  }

  line(id, level) {
    const node = this.nodes[id], line = html("div", "line", html("span", "fold-mark"), html("span", "span-kind", `${level} ${node.kind}`));
    if (this.survivors.has(id)) line.append(html("span", "hidden", "survivor"));
    line.append(textBlock(...this.shortText(node)), ...this.columns.map(({ name }) => this.number(name, hasNumber(node, name) ? shortNumber(node.numbers[name]) : "")));
    const credit = this.number("advantage", node.advantage === null ? "" : signed(node.advantage));
    credit.className = "credit";
    if (node.advantage !== null) credit.append(advantageBar());
    line.append(credit, this.outcome(id));
    return tone(line, node.advantage, this.scale);
  }

  shortText(node) {
    const text = node.text.replace(/\s+/g, " ").trim();
    return text ? [firstCharacters(text, 200)] : [nothingToSee(node.text)];
  }

  number(name, text) {
    return text ? html("span", "number", html("span", "name", `${name} `), text) : html("span", "number");
  }

  /* The grade of a leaf; of a span above leaves how many of them are right. */
  outcome(id) {
    const { leaves, right, spans } = this.counts[id], node = this.nodes[id];
    if (node.grade && node.grade.outcome !== NOT_GRADED) return verdict(node.grade);
    const made = html("span", "below", node.grade ? NOT_GRADED : shareRight(right, leaves));
    if (spans) made.append(html("span", "folded", `+${spans}`));
    if (node.left_out) made.append(` ${node.left_out} not on this page`);
    return made;
  }

  names() {
    const head = html("div", "line names", html("span", ""), html("span", "", "depth, kind"), html("span", "", "text"));
    for (const { name, meaning } of this.columns) {
      const cell = html("span", "number", name);
      cell.title = meaning.replaceAll("`", "");
      head.append(cell);
    }
    head.append(html("span", "credit", "advantage"), html("span", "", "grade"));
    return head;
  }

  detail(id) {
    const node = this.nodes[id], facts = html("p", "facts");
    for (const { name } of data.numbers) if (hasNumber(node, name)) facts.append(html("span", "", html("b", "", name), ` ${shortNumber(node.numbers[name])}`));
    facts.append(html("span", "", `${node.tokens.toLocaleString("en")} tokens${node.stop ? `, stopped: ${node.stop}` : ""}`));
    const made = html("div", "detail", facts);
    if (node.reason) made.append(html("p", "reason", `Critic: ${node.reason}`));
    made.append(...critiqueProblem(node.critique));
    made.append(...gradeParts(node.grade));
    if (node.grade?.reason) made.append(html("p", "reason", `Grader: ${node.grade.reason}`));
    return made;
  }

  isFolded(item) {
    return item.getAttribute("aria-expanded") === "false";
  }

  fold(item, folded) {
    const children = item.querySelector(":scope > .children");
    if (!children) return;
    children.hidden = folded;
    item.setAttribute("aria-expanded", String(!folded));
  }

  /* A span and those that continue it alone in its own group: the pieces of one completion. */
  pieces(id) {
    const found = [id];
    for (let [next, ...more] = this.below[id]; next !== undefined && !more.length; [next, ...more] = this.below[next]) {
      if (this.nodes[next].group !== this.nodes[id].group) break;
      found.push(next);
    }
    return found;
  }

  /* Group below group as long as the lines stay few; the path that the tree was grown along in any case. */
  unfoldFirst() {
    let level = this.top, lines = level.length;
    while (level.length) {
      const whole = level.flatMap((id) => this.pieces(id)), next = level.flatMap((id) => this.below[this.pieces(id).at(-1)]);
      lines += whole.length - level.length + next.length;
      if (lines > LINES_AT_FIRST) break;
      for (const id of whole) this.fold(this.items[id], false);
      level = next;
    }
    for (const id of this.survivors) this.fold(this.items[id], false);
  }

  foldAll(folded) {
    for (const item of this.items) this.fold(item, folded);
    if (folded) this.focusable(this.current.closest(".tree-items > .siblings > .item"));
  }

  /* A line with its whole text and all that is known of the span, or again its beginning alone. */
  open(item) {
    const id = Number(item.dataset.node), node = this.nodes[id], line = item.firstElementChild, block = line.querySelector(".block");
    if (!item.classList.toggle("opened")) {
      block.replaceChildren(...this.shortText(node));
      line.nextElementSibling.remove();
      return;
    }
    if (node.text.trim()) block.replaceChildren(ownLines(node.text));
    line.after(this.detail(id));
    document.getElementById("announcer").textContent = `${block.textContent} ${line.nextElementSibling.textContent}`;
  }

  /* The one item that the Tab key reaches. */
  focusable(item) {
    this.current.tabIndex = -1;
    this.current = item;
    item.tabIndex = 0;
  }

  focus(item) {
    if (!item) return;
    this.focusable(item);
    item.focus({ preventScroll: true });
    item.firstElementChild.scrollIntoView({ block: "nearest" });
  }

  click(event) {
    const line = event.target.closest(".line");
    if (!line) return;
    const item = line.parentElement;
    this.focus(item);
    if (event.target.closest(".fold-mark") && item.hasAttribute("aria-expanded")) this.fold(item, !this.isFolded(item));
    else if (!getSelection().toString()) this.open(item);
  }

  key(event) {
    if (!event.target.matches(".item") || event.ctrlKey || event.altKey || event.metaKey) return;
    const item = event.target, moves = {
      ArrowDown: () => this.focus(this.beside(item, 1)),
      ArrowUp: () => this.focus(this.beside(item, -1)),
      Home: () => this.focus(this.visible()[0]),
      End: () => this.focus(this.visible().at(-1)),
      ArrowRight: () => (this.isFolded(item) ? this.fold(item, false) : this.focus(item.querySelector(".children .item"))),
      ArrowLeft: () => (item.getAttribute("aria-expanded") === "true" ? this.fold(item, true) : this.focus(item.parentElement.closest(".item"))),
      Enter: () => this.open(item),
      " ": () => this.open(item),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    moves[event.key]();
  }

  visible() {
    return [...this.list.querySelectorAll(".item")].filter((item) => !item.parentElement.closest("[hidden]"));
  }

  beside(item, by) {
    const visible = this.visible();
    return visible[visible.indexOf(item) + by];
  }
}

let askForTree = () => {};

function startTrees() {
  const section = document.getElementById("tree");
  if (!section) return;
  const [step, row, place, about] = ["step", "row", "place", "about"].map((name) => document.getElementById(`tree-${name}`));
  const option = (text, value) => new Option(text, String(value));
  let view;
  const show = () => {
    const prompt = data.steps[step.value].prompts[row.value];
    view = new TreeView(prompt);
    place.replaceChildren(view.element);
    const shown = prompt.nodes.length, all = prompt.spans, samples = `${prompt.drawn} ${prompt.drawn === 1 ? "sample" : "samples"}`;
    about.textContent = `${samples} · ${shown === all ? `${all} spans` : `${shown} of ${all} spans are on this page; trees.jsonl has all`}`
      + (prompt.survivors?.length ? " · ★ the path that it was grown along" : "");
  };
  const choose = (stepIndex, promptIndex) => {
    step.value = String(stepIndex);
    row.replaceChildren(...data.steps[stepIndex].prompts.map((prompt, index) => option(`row ${prompt.row}, ${prompt.spans} spans`, index)));
    row.value = String(promptIndex);
    show();
  };
  const branching = (index) => data.steps[index].prompts.findIndex((prompt) => prompt.branches);
  step.append(...data.steps.map((each, index) => option(each.step.toLocaleString("en"), index)));
  step.addEventListener("change", () => choose(step.value, Math.max(0, branching(step.value))));
  row.addEventListener("change", show);
  document.getElementById("tree-unfold").addEventListener("click", () => view.foldAll(false));
  document.getElementById("tree-fold").addEventListener("click", () => view.foldAll(true));
  const last = data.steps.findLastIndex((each, index) => branching(index) >= 0);
  if (last >= 0) choose(last, branching(last));
  askForTree = (prompt) => {
    const index = data.steps.findIndex((each) => each.prompts.includes(prompt));
    section.hidden = false;
    choose(index, data.steps[index].prompts.indexOf(prompt));
    section.scrollIntoView({ block: "start" });
    document.getElementById("tree-title").focus({ preventScroll: true });
  };
}

startTrees();
