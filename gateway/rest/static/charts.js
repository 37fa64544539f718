// The figures beside the tree: speed lanes, acceptance by level, time by stage, totals.

import { stagesOf } from "./run.js";

const SVG = "http://www.w3.org/2000/svg";
const STAGES = { calibrate: "calibrate", fuzzy: "fuzzy steps", draft: "draft, rest", verify: "verify", overhead: "overhead" };
const SHOWN_ROUNDS = 48;
const CHART = { width: 480, height: 108, left: 30, bottom: 4 };

function node(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function number(value, digits = 1) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

/** A speed as it is shown. */
export const visibleSpeed = (speed) => number(speed, speed < 10 ? 1 : 0);

/** Show a run's speed in its lane; `fastest` is the speed that fills a lane. */
export function drawLane(lane, run, fastest) {
  lane.querySelector(".speed b").textContent = number(run?.speed ?? null);
  lane.querySelector(".bar").style.width = `${fastest && run?.speed ? Math.max(1, (100 * run.speed) / fastest) : 0}%`;
}

/** One row per level: how often it was accepted, of the rounds that had it. */
export function drawLevels(table, run) {
  if (!run.levels.length) {
    table.tBodies[0].replaceChildren(node("tr", {}, node("td", { className: "light", textContent: run.rounds.length > 1 ? "nothing was drafted" : "no rounds yet" })));
    return;
  }
  const rows = run.levels.map(([drafted, accepted], level) => {
    const bar = node("span", { className: "bar accepted" });
    bar.style.width = `${(100 * accepted) / drafted}%`;
    return node(
      "tr",
      { title: `${accepted} of ${drafted} rounds` },
      node("th", { scope: "row", textContent: `level ${level + 1}` }),
      node("td", {}, node("span", { className: "track" }, bar)),
      node("td", { textContent: `${number((100 * accepted) / drafted, 0)} %` }),
    );
  });
  table.tBodies[0].replaceChildren(...rows);
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A stacked bar per round, the latest on the right. The first round holds the prompt and is left out. */
export function drawStages(container, means, run) {
  const rounds = run.rounds.slice(1);
  if (!rounds.length) {
    container.replaceChildren();
    means.replaceChildren();
    return;
  }
  const shown = rounds.slice(-SHOWN_ROUNDS);
  const sorted = shown.map((round) => round.timings_ms.round).sort((a, b) => a - b);
  // One slow round must not flatten the others: the scale ends a little above nearly all of them.
  const top = Math.max(sorted.at(-1) * 0.25, sorted[Math.floor((sorted.length - 1) * 0.95)] * 1.1);
  const svg = shape("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": meansInWords(rounds) });
  const height = CHART.height - CHART.bottom - 8;
  const base = CHART.height - CHART.bottom;
  for (const share of [0.5, 1]) {
    const y = base - (height * share) / 1.1;
    svg.append(shape("line", { x1: CHART.left, x2: CHART.width, y1: y, y2: y }));
    svg.append(shape("text", { class: "axis", x: 0, y: y + 3 }, `${number((top * share) / 1.1, top < 10 ? 1 : 0)} ms`));
  }
  const left = CHART.left + 8;
  const step = (CHART.width - left) / SHOWN_ROUNDS;
  shown.forEach((round, i) => {
    let y = base;
    for (const [stage, ms] of Object.entries(stagesOf(round))) {
      const size = Math.min((height * ms) / top, y - 2);
      y -= size;
      svg.append(shape("rect", { class: stage, x: left + i * step, y, width: step - 1.5, height: size }));
    }
  });
  container.replaceChildren(svg);
  const means_ms = meanStages(rounds);
  means.replaceChildren(
    ...Object.entries(STAGES).map(([stage, name]) =>
      node("div", {}, node("dt", {}, node("i", { className: stage }), name), node("dd", { textContent: `${number(means_ms[stage], 2)} ms` })),
    ),
  );
}

function meanStages(rounds) {
  const sums = Object.fromEntries(Object.keys(STAGES).map((stage) => [stage, 0]));
  for (const round of rounds) for (const [stage, ms] of Object.entries(stagesOf(round))) sums[stage] += ms / rounds.length;
  return sums;
}

function meansInWords(rounds) {
  const parts = Object.entries(meanStages(rounds)).map(([stage, ms]) => `${STAGES[stage]} ${number(ms, 2)} ms`);
  return `Mean of ${rounds.length} rounds: ${parts.join(", ")}`;
}

/** What the run came to. */
export function drawTotals(list, run, seed) {
  const rate = run.numDraftTokens ? run.numAccepted / run.numDraftTokens : null;
  const entries = {
    "output tokens": String(run.usage?.completion_tokens ?? run.numTokens),
    "base model passes": String(run.rounds.length),
    "tokens a drafted round": number(run.meanAcceptanceLength, 2),
    "guesses kept": rate === null ? "–" : `${run.numAccepted} of ${run.numDraftTokens} (${number(100 * rate, 0)} %)`,
    "verdicts guessed ahead": run.ahead.length ? `${run.aheadHits} of ${run.ahead.length} (${number(run.aheadMs, 0)} ms saved)` : "–",
    "first token after": `${number(run.firstMs, 0)} ms`,
    "prompt tokens": run.usage ? String(run.usage.prompt_tokens) : "–",
    "ended by": run.finishReason ?? "–",
    seed: String(seed),
  };
  list.replaceChildren(
    ...Object.entries(entries).map(([name, value]) => node("div", {}, node("dt", { textContent: name }), node("dd", { textContent: value }))),
  );
}

/** The end of a race in words; null while there is nothing to compare. */
export function raceResult(drafted, plain) {
  if (!drafted?.speed || !plain?.speed) return null;
  return { factor: drafted.speed / plain.speed, isSame: drafted.text === plain.text };
}
