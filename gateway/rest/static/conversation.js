// The conversation: what was said, and how it is shown.

import { renderMarkdown } from "./markdown.js";
import { visibleSpeed } from "./charts.js";

function make(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function button(label, title = label) {
  const made = make("button", "quiet", label);
  made.type = "button";
  made.title = title;
  return made;
}

/** The parts of spans that lie in a stretch of text, as nodes; text without a span stands alone. */
function coloured(text, spans, start, end) {
  const nodes = [];
  let at = start;
  let i = firstAfter(spans, start);
  while (at < end) {
    const span = spans[i];
    if (!span || span.start >= end) break;
    if (span.start > at) nodes.push(text.slice(at, span.start));
    const token = make("span", `t ${span.kind}`, text.slice(Math.max(at, span.start), Math.min(end, span.end)));
    token.dataset.round = span.round;
    nodes.push(token);
    at = Math.min(end, span.end);
    i += 1;
  }
  if (at < end) nodes.push(text.slice(at, end));
  return nodes;
}

/** The index of the first span that ends after a place. */
function firstAfter(spans, place) {
  let [low, high] = [0, spans.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle].end <= place) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** An answer: its run, the request that made it, and its place on the page. */
export class Answer {
  constructor(request, run, prompt = null) {
    this.request = request;
    this.run = run;
    this.plain = null; // the run of a race
    this.prompt = prompt; // of a text to go on with, shown before what came
    this.body = make("div", prompt === null ? "words" : "words verbatim");
    this.foot = make("div", "foot");
    this.foot.hidden = true;
    this.element = make("article", "answer", make("h2", "hidden", "The model"), this.body, this.foot);
    this.copy = button("Copy", "Copy the answer");
    this.again = button("Regenerate", "Answer once more");
    this.look = button("Look inside", "How it was guessed and checked");
    this.figures = make("span", "figures");
    this.foot.append(this.figures, this.copy, this.again, this.look);
  }

  get isComplete() {
    return this.run.finishReason !== null;
  }

  /** Show what has come so far. */
  draw(isRunning) {
    const { text, thought, spans } = this.run;
    const leaf = (start, end) => coloured(text, spans, start, end);
    const nodes = [];
    if (thought) {
      const summary = make("summary", "", text ? "What it thought first" : "Thinking…");
      const details = make("details", "thought", summary, make("p", "", thought));
      details.open = this.body.querySelector("details.thought")?.open ?? false;
      nodes.push(details);
    }
    if (this.prompt === null) nodes.push(...renderMarkdown(text, leaf));
    else nodes.push(make("span", "prompt", this.prompt), ...leaf(0, text.length));
    if (isRunning && !text) nodes.push(make("p", "waiting", thought ? "" : "reading…"));
    this.body.replaceChildren(...nodes);
    this.element.setAttribute("aria-busy", String(isRunning));
    this.foot.hidden = isRunning || !this.run.numTokens;
    if (!this.foot.hidden) this.figures.textContent = this.inFigures();
  }

  inFigures() {
    const { run } = this;
    const parts = [`${run.numTokens} ${run.numTokens === 1 ? "token" : "tokens"}`];
    if (run.speed) parts.push(`${visibleSpeed(run.speed)} tokens/s`);
    if (run.numDraftRounds) parts.push(`${run.rounds.length} passes`);
    if (run.finishReason === "length") parts.push("cut at max tokens");
    if (!this.isComplete) parts.push("stopped");
    return parts.join(" · ");
  }

  mark(round) {
    for (const token of this.body.querySelectorAll(".now")) token.classList.remove("now");
    for (const token of this.body.querySelectorAll(`[data-round="${round}"]`)) token.classList.add("now");
  }
}

/** What was said, oldest first, as [{question, answer}] with an element for each. */
export class Conversation {
  constructor(list) {
    this.list = list;
    this.turns = [];
  }

  get last() {
    return this.turns.at(-1) ?? null;
  }

  /** The messages before the next one, as the API has them. */
  messages() {
    return this.turns
      .filter(({ answer }) => answer.prompt === null && answer.run.text)
      .flatMap(({ question, answer }) => [
        { role: "user", content: question },
        { role: "assistant", content: answer.run.text },
      ]);
  }

  add(question, answer) {
    const said = make("article", "question", make("h2", "hidden", "You"), make("p", "", question));
    said.hidden = answer.prompt !== null;
    const element = make("div", "turn", said, answer.element);
    this.list.append(element);
    this.turns.push({ question, answer, element });
    this.offerAgain();
  }

  /** Forget the last turn; returns it. */
  drop() {
    const turn = this.turns.pop();
    turn?.element.remove();
    this.offerAgain();
    return turn ?? null;
  }

  clear() {
    this.turns = [];
    this.list.replaceChildren();
  }

  /** Only the last answer can be made again: what follows the others was said about them. */
  offerAgain() {
    for (const { answer } of this.turns) answer.again.hidden = answer !== this.last.answer;
  }
}
