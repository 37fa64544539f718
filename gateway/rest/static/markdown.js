// Markdown as nodes of the page, never as HTML: what a model writes cannot become a tag.
//
// Every stretch of plain text is made by `leaf(start, end)`, of positions in the source, so that its tokens can be told
// apart in it.

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const SAFE_LINK = /^(https?:|mailto:)/i;
const LINK = /^\[([^\]\n]*)\]\(([^)\s]+)\)/;
const BARE_LINK = /^https?:\/\/[^\s<>()"'*`]+[^\s<>()"'*`.,;:!?]/;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;
// What is nested deeper than real texts are is shown as text.
const MOST_NESTED = 8;

function make(name, children = [], className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** The nodes of a text in Markdown; `leaf(start, end)` returns those of a stretch of it as it stands. */
export function renderMarkdown(source, leaf) {
  const lines = [];
  let start = 0;
  for (const text of source.split("\n")) {
    lines.push({ start, end: start + text.length });
    start += text.length + 1;
  }
  return new Blocks(source, leaf).render(lines, 0);
}

/** Paragraphs, lists, tables and the like. A line is `{start, end}` in the source, without what it is nested in. */
class Blocks {
  constructor(source, leaf) {
    this.source = source;
    this.leaf = leaf;
    const sizes = source.split("\n").map((line) => HEADING.exec(line)?.[1].length ?? 6);
    this.topHeading = Math.min(...sizes);
  }

  text(line) {
    return this.source.slice(line.start, line.end);
  }

  render(lines, depth) {
    const nodes = [];
    let at = 0;
    while (at < lines.length) {
      if (!this.text(lines[at]).trim()) {
        at += 1;
        continue;
      }
      const [node, next] = this.block(lines, at, depth);
      nodes.push(node);
      at = next;
    }
    return nodes;
  }

  /** The block that begins at a line, and the number of the line after it. */
  block(lines, at, depth) {
    const text = this.text(lines[at]);
    const fence = FENCE.exec(text);
    if (fence) return this.code(lines, at, fence);
    const heading = HEADING.exec(text);
    if (heading) return [this.heading(lines[at], heading), at + 1];
    if (RULE.test(text)) return [make("hr"), at + 1];
    if (depth < MOST_NESTED && QUOTE.test(text)) return this.quote(lines, at, depth);
    if (depth < MOST_NESTED && ITEM.test(text)) return this.list(lines, at, depth);
    if (this.beginsTable(lines, at)) return this.table(lines, at);
    return this.paragraph(lines, at);
  }

  code(lines, at, [, indent, marks, language]) {
    const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
    const inner = [];
    let next = at + 1;
    while (next < lines.length && !closing.test(this.text(lines[next]))) inner.push(lines[next++]);
    const code = make("code");
    for (const line of inner) {
      const cut = Math.min(indent.length, /^ */.exec(this.text(line))[0].length);
      code.append(...this.leaf(line.start + cut, line.end), "\n");
    }
    const pre = make("pre", [code]);
    pre.tabIndex = 0;
    const copy = make("button", ["Copy"], "quiet copy-code");
    copy.type = "button";
    copy.setAttribute("aria-label", "Copy the code");
    const head = make("div", [make("span", [language || "code"]), copy], "code-head");
    return [make("div", [head, pre], "code"), next + 1];
  }

  heading(line, [, marks, words]) {
    const start = line.start + this.text(line).indexOf(words, marks.length);
    // The page itself has the first levels; the answer's begin below them, wherever it begins.
    return make(`h${Math.min(6, 3 + marks.length - this.topHeading)}`, this.inline([{ start, end: start + words.length }]));
  }

  quote(lines, at, depth) {
    const inner = [];
    let next = at;
    while (next < lines.length && QUOTE.test(this.text(lines[next]))) {
      const line = lines[next++];
      inner.push({ start: line.start + QUOTE.exec(this.text(line))[0].length, end: line.end });
    }
    return [make("blockquote", this.render(inner, depth + 1)), next];
  }

  list(lines, at, depth) {
    const [, firstIndent, firstMarker] = ITEM.exec(this.text(lines[at]));
    const isOrdered = /\d/.test(firstMarker);
    const list = make(isOrdered ? "ol" : "ul");
    if (isOrdered && parseInt(firstMarker, 10) !== 1) list.start = parseInt(firstMarker, 10);
    let next = at;
    while (next < lines.length) {
      const item = ITEM.exec(this.text(lines[next]));
      if (!item || /\d/.test(item[2]) !== isOrdered || item[1].length > firstIndent.length + 1) break;
      const [inner, after] = this.item(lines, next, item);
      const nodes = this.render(inner, depth + 1);
      const isTight = nodes[0]?.tagName === "P" && nodes.slice(1).every((node) => /^(UL|OL)$/.test(node.tagName));
      list.append(make("li", isTight ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes));
      next = after;
      const following = lines.slice(next).findIndex((line) => this.text(line).trim());
      if (following > 0 && ITEM.test(this.text(lines[next + following]))) next += following;
    }
    return [list, next];
  }

  /** The lines of an item without its marker, and the number of the line after it. */
  item(lines, at, [marker, indent]) {
    const inner = [{ start: lines[at].start + marker.length, end: lines[at].end }];
    let next = at + 1;
    while (next < lines.length) {
      const text = this.text(lines[next]);
      const own = /^\s*/.exec(text)[0].length;
      if (!text.trim()) {
        const after = lines.slice(next).find((line) => this.text(line).trim());
        if (!after || /^\s*/.exec(this.text(after))[0].length <= indent.length) break;
      } else if (own <= indent.length && (ITEM.test(text) || this.beginsBlock(text) || !this.text(lines[next - 1]).trim())) {
        break;
      }
      inner.push({ start: lines[next].start + Math.min(own, marker.length), end: lines[next].end });
      next += 1;
    }
    return [inner, next];
  }

  beginsTable(lines, at) {
    const [head, rule] = [lines[at], lines[at + 1]];
    return Boolean(rule) && this.text(head).includes("|") && this.text(rule).includes("|") && TABLE_RULE.test(this.text(rule));
  }

  table(lines, at) {
    const row = (line, name) => make("tr", this.cells(line).map((cell) => make(name, this.inline([cell]))));
    const body = [];
    let next = at + 2;
    while (next < lines.length && this.text(lines[next]).includes("|")) body.push(row(lines[next++], "td"));
    const table = make("table", [make("thead", [row(lines[at], "th")]), make("tbody", body)]);
    const scroller = make("div", [table], "table");
    scroller.tabIndex = 0;
    return [scroller, next];
  }

  cells(line) {
    const text = this.text(line);
    const from = /^\s*\|?/.exec(text)[0].length;
    const to = text.length - /\|?\s*$/.exec(text)[0].length;
    const cells = [];
    let start = from;
    for (let i = from; i <= to; i++) {
      if (i < to && (text[i] !== "|" || text[i - 1] === "\\")) continue;
      const words = text.slice(start, i);
      const cut = words.length - words.trimStart().length;
      cells.push({ start: line.start + start + cut, end: line.start + start + cut + words.trim().length });
      start = i + 1;
    }
    return cells;
  }

  paragraph(lines, at) {
    let next = at + 1;
    while (next < lines.length) {
      const text = this.text(lines[next]);
      if (!text.trim() || this.beginsBlock(text) || ITEM.test(text) || this.beginsTable(lines, next)) break;
      next += 1;
    }
    return [make("p", this.inline(lines.slice(at, next))), next];
  }

  beginsBlock(text) {
    return FENCE.test(text) || HEADING.test(text) || RULE.test(text) || QUOTE.test(text);
  }

  inline(lines) {
    return new Inline(this.source, this.leaf, lines).nodes();
  }
}

/** Emphasis, code and links of lines that belong together. */
class Inline {
  constructor(source, leaf, lines) {
    this.leaf = leaf;
    this.lines = lines;
    this.text = lines.map((line) => source.slice(line.start, line.end)).join("\n");
  }

  nodes() {
    return this.parse(0, this.text.length, 0);
  }

  parse(from, to, depth) {
    const nodes = [];
    let plain = from;
    let at = from;
    const take = (node, next) => {
      nodes.push(...this.plain(plain, at), ...(node ? [node] : []));
      plain = at = next;
    };
    while (at < to) {
      if (this.text[at] === "\\" && at + 1 < to && ESCAPABLE.test(this.text[at + 1])) {
        take(null, at + 1);
        at += 1; // the escaped sign is text, whatever it is
        continue;
      }
      const [node, next] = this.special(at, to, depth);
      if (node) take(node, next);
      else at += next;
    }
    nodes.push(...this.plain(plain, to));
    return nodes;
  }

  /** What begins at a place and the place after it; where it is text, null and how many signs of it. */
  special(at, to, depth) {
    const sign = this.text[at];
    if (sign === "`") return this.code(at, to);
    if (depth < MOST_NESTED && (sign === "*" || sign === "_" || sign === "~")) return this.emphasis(at, to, depth);
    if (sign === "[" || sign === "h") return this.link(at, to, depth);
    return [null, 1];
  }

  code(at, to) {
    const marks = /^`+/.exec(this.text.slice(at, to))[0];
    const inner = at + marks.length;
    const end = this.text.slice(0, to).indexOf(marks, inner);
    if (end < 0 || this.text[end + marks.length] === "`") return [null, marks.length];
    return [make("code", this.plain(inner, end)), end + marks.length];
  }

  emphasis(at, to, depth) {
    const sign = this.text[at];
    const size = this.text.startsWith(sign + sign, at) ? 2 : 1;
    const inner = at + size;
    const isWithinWord = sign === "_" && at > 0 && WORD.test(this.text[at - 1]);
    if ((sign === "~" && size === 1) || isWithinWord || inner >= to || /\s/.test(this.text[inner])) return [null, size];
    for (let end = inner + 1; end + size <= to; end++) {
      const isClosing = this.text.startsWith(sign.repeat(size), end) && !/\s/.test(this.text[end - 1]);
      const isLonger = size === 1 && (this.text[end + 1] === sign || this.text[end - 1] === sign);
      const endsInWord = sign === "_" && WORD.test(this.text[end + size] ?? " ");
      if (!isClosing || isLonger || endsInWord) continue;
      const name = sign === "~" ? "del" : size === 2 ? "strong" : "em";
      return [make(name, this.parse(inner, end, depth + 1)), end + size];
    }
    return [null, size];
  }

  link(at, to, depth) {
    const rest = this.text.slice(at, to);
    const named = LINK.exec(rest);
    if (named && SAFE_LINK.test(named[2])) {
      return [this.anchor(named[2], this.parse(at + 1, at + 1 + named[1].length, depth + 1)), at + named[0].length];
    }
    const bare = BARE_LINK.exec(rest);
    if (bare) return [this.anchor(bare[0], this.plain(at, at + bare[0].length)), at + bare[0].length];
    return [null, 1];
  }

  anchor(url, children) {
    const link = make("a", children);
    link.href = url;
    link.target = "_blank";
    link.rel = "noopener noreferrer";
    return link;
  }

  /** Text as it stands, of the joined lines, each of which is elsewhere in the source. */
  plain(from, to) {
    const nodes = [];
    let begin = 0;
    for (const line of this.lines) {
      const end = begin + line.end - line.start;
      const [first, last] = [Math.max(from, begin), Math.min(to, end)];
      if (first < last) nodes.push(...this.leaf(line.start + first - begin, line.start + last - begin));
      if (end >= from && end < to) nodes.push(make("br"));
      begin = end + 1;
    }
    return nodes;
  }
}
