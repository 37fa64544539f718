// A draft tree as SVG: guesses from left to right, the accepted path highlighted, the bonus token at its end.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 27;
const NODE_HEIGHT = 21;
const GAP = 34;
const CHAR = 7.4;
const MAX_CHARS = 16;
const TOP = 20;
const LEVEL_NAME = 42; // its width, above a column

/** A token as it can be seen: blanks, line ends and tabs have signs, and a long one is cut. */
export function visible(text) {
  const shown = text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  const chars = [...shown];
  return chars.length > MAX_CHARS ? `${chars.slice(0, MAX_CHARS - 1).join("")}…` : shown || "∅";
}

/** The nodes to draw: root, guesses and the bonus token, each with depth, kind and parent. */
function nodesOf(round) {
  const accepted = new Set(round.accepted_rows);
  const nodes = [{ text: round.lastToken ?? "…", depth: 0, kind: "root", parent: null, children: [] }];
  round.tree.parent_rows.forEach((parent, i) => {
    const kind = accepted.has(i + 1) ? "accepted" : "rejected";
    nodes.push({ text: round.tree.token_texts[i], depth: nodes[parent].depth + 1, kind, parent: nodes[parent], children: [] });
  });
  if (round.token_texts.length > round.accepted_rows.length) {
    const parent = nodes[round.accepted_rows.at(-1) ?? 0];
    nodes.push({ text: round.token_texts.at(-1), depth: parent.depth + 1, kind: "bonus", parent, children: [] });
  }
  for (const node of nodes) node.parent?.children.push(node);
  return nodes;
}

/** Gives every node its row: what was kept first, so that it is one straight line along the top. */
function place(nodes) {
  let nextRow = 0;
  const rank = { accepted: 0, bonus: 1, rejected: 2 };
  const visit = (node) => {
    node.row = nextRow;
    node.children.sort((a, b) => rank[a.kind] - rank[b.kind]);
    node.children.forEach((child, i) => {
      if (i > 0) nextRow += 1;
      visit(child);
    });
  };
  visit(nodes[0]);
  return nextRow + 1;
}

function columnsOf(nodes) {
  const widths = [];
  for (const node of nodes) {
    node.width = Math.max(26, [...visible(node.text)].length * CHAR + 14);
    widths[node.depth] = Math.max(widths[node.depth] ?? 0, node.width);
  }
  const lefts = [];
  let x = 4;
  for (const width of widths) {
    lefts.push(x);
    x += width + GAP;
  }
  return { lefts, total: Math.max(x - GAP, lefts.at(-1) + LEVEL_NAME) + 4 };
}

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** What a round was, in words: for the line above the tree and for screen readers. */
export function inWords(round) {
  const numGuesses = round.tree.parent_rows.length;
  const bonus = round.token_texts.length > round.accepted_rows.length ? round.token_texts.at(-1) : null;
  if (!numGuesses) {
    return `No guesses in this round: the base model says “${visible(bonus ?? "")}”.`;
  }
  const path = round.token_texts.slice(0, round.accepted_rows.length).map(visible).join("");
  const kept = path ? `${round.accepted_rows.length} kept (“${path}”)` : "none kept";
  const own = bonus === null ? "" : `, then the base model's own “${visible(bonus)}”`;
  const count = round.token_texts.length;
  return `${numGuesses} guesses, ${kept}${own}: ${count} ${count === 1 ? "token" : "tokens"} from one pass.`;
}

/** Draw the tree of a round into `place`, which keeps its height while trees are smaller. */
export function drawTree(container, round) {
  const nodes = nodesOf(round);
  const numRows = place(nodes);
  const { lefts, total } = columnsOf(nodes);
  const height = TOP + Math.max(numRows, 6) * ROW;
  const svg = element("svg", { width: total, height, viewBox: `0 0 ${total} ${height}`, role: "img", "aria-label": inWords(round) });
  const y = (node) => TOP + node.row * ROW + ROW / 2;
  const numLevels = Math.max(...nodes.map((node) => (node.kind === "bonus" ? 0 : node.depth)));
  lefts.forEach((left, depth) => {
    const name = depth === 0 ? "so far" : depth <= numLevels ? `level ${depth}` : "bonus";
    svg.append(element("text", { class: "level", x: left, y: 8 }, name));
  });
  for (const node of nodes) {
    if (!node.parent) continue;
    const [x1, y1, x2, y2] = [lefts[node.parent.depth] + node.parent.width, y(node.parent), lefts[node.depth], y(node)];
    const middle = x2 - GAP / 2;
    svg.append(element("path", { class: `edge ${node.kind}`, d: `M${x1} ${y1}H${middle - GAP / 3}C${middle} ${y1} ${middle - 6} ${y2} ${x2} ${y2}` }));
  }
  for (const node of nodes) {
    const group = element("g", { class: node.kind });
    group.append(
      element("rect", { x: lefts[node.depth], y: y(node) - NODE_HEIGHT / 2, width: node.width, height: NODE_HEIGHT, rx: 6 }),
      element("text", { x: lefts[node.depth] + node.width / 2, y: y(node) + 0.5 }, visible(node.text)),
      element("title", {}, JSON.stringify(node.text)),
    );
    svg.append(group);
  }
  container.replaceChildren(svg);
}
