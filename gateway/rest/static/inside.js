// The panel beside an answer: its trees, its figures, and a race against plain decoding.

import { drawLane, drawLevels, drawStages, drawTotals, raceResult } from "./charts.js";
import { drawTree, inWords } from "./tree.js";

const REPLAY_MS = 1100;
// What stands here until there is an answer: a round as any other.
const EXAMPLE = {
  lastToken: "The",
  token_texts: [" cat", " sat", " on", " a"],
  accepted_rows: [1, 3, 5],
  tree: {
    token_texts: [" cat", " dog", " sat", " is", " on", " down", " ran", " the"],
    parent_rows: [0, 0, 1, 1, 3, 3, 2, 5],
  },
};

const byId = (id) => document.getElementById(id);

export class Inside {
  constructor() {
    this.answer = null;
    this.shown = -1;
    this.isFollowing = true;
    this.replay = null;
    this.clear();
  }

  get isOpen() {
    return !byId("inside").hidden;
  }

  setOpen(isOpen) {
    byId("inside").hidden = !isOpen;
    byId("columns").classList.toggle("open", isOpen);
    byId("look-inside").setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) this.stopReplay();
    else this.draw(false);
  }

  /** Show this answer from now on. */
  follow(answer) {
    this.stopReplay();
    this.answer?.mark(-1);
    Object.assign(this, { answer, shown: -1, isFollowing: true });
    byId("verdict").textContent = "";
    for (const id of ["tree", "totals", "stages", "stage-means"]) byId(id).replaceChildren();
    byId("tree-words").textContent = "The first round reads the prompt.";
    byId("round-name").textContent = "";
  }

  clear() {
    this.follow(null);
    for (const id of ["round", "previous", "next", "replay", "race"]) byId(id).disabled = true;
    drawTree(byId("tree"), EXAMPLE);
    byId("tree-words").textContent = `For example: ${inWords(EXAMPLE)}`;
    for (const id of ["lane-drafted", "lane-plain"]) drawLane(byId(id), null, 0);
    drawLevels(byId("levels"), { levels: [], rounds: [] });
  }

  /** Show how far it has come; `isRunning` while tokens arrive, of the answer or of its race. */
  draw(isRunning) {
    if (!this.answer || !this.isOpen) return;
    const { run, plain } = this.answer;
    const fastest = Math.max(run.speed ?? 0, plain?.speed ?? 0);
    drawLane(byId("lane-drafted"), run, fastest);
    drawLane(byId("lane-plain"), plain, fastest);
    byId("race").disabled = isRunning || !this.answer.isComplete || run.numDraftRounds === 0;
    this.drawVerdict(isRunning);
    drawLevels(byId("levels"), run);
    drawStages(byId("stages"), byId("stage-means"), run);
    if (!run.rounds.length) return;
    drawTotals(byId("totals"), run, this.answer.request.body.seed);
    if (this.isFollowing) this.show(isRunning && !plain ? run.rounds.length - 1 : lastTelling(run.rounds), false);
    else this.show(this.shown, false);
  }

  drawVerdict(isRunning) {
    const { run, plain } = this.answer;
    const verdict = byId("verdict");
    const result = raceResult(run, plain);
    if (!plain) {
      verdict.textContent = !isRunning && this.answer.isComplete && run.numDraftRounds === 0 ? "Nothing was drafted: this was plain decoding." : "";
      return;
    }
    if (!result) return;
    const times = Object.assign(document.createElement("b"), { textContent: `${result.factor.toFixed(2)}×` });
    if (!plain.finishReason) {
      verdict.replaceChildren(times, " the speed of plain decoding so far");
      return;
    }
    const badge = Object.assign(document.createElement("span"), { className: result.isSame ? "same" : "differs" });
    badge.textContent = result.isSame ? "✓ identical text" : "✗ the texts differ";
    verdict.replaceChildren(times, ` the speed: ${run.rounds.length} passes of the base model instead of ${plain.rounds.length}, `, badge);
  }

  /** Show a round's tree and mark its tokens; `isChosen` if a person asked for it. */
  show(index, isChosen) {
    const rounds = this.answer?.run.rounds ?? [];
    const round = rounds[index];
    if (!round) return;
    if (isChosen) this.isFollowing = false;
    if (this.shown !== index) {
      this.shown = index;
      drawTree(byId("tree"), round);
      byId("tree-words").textContent = inWords(round);
    }
    this.answer.mark(index);
    byId("round-name").textContent = `round ${index + 1} of ${rounds.length}`;
    const slider = byId("round");
    slider.max = rounds.length - 1;
    slider.value = index;
    slider.setAttribute("aria-valuetext", `round ${index + 1} of ${rounds.length}: ${inWords(round)}`);
    slider.disabled = rounds.length < 2;
    byId("previous").disabled = index === 0;
    byId("next").disabled = index === rounds.length - 1;
    byId("replay").disabled = rounds.length < 2;
  }

  choose(index) {
    this.stopReplay();
    this.show(index, true);
  }

  toggleReplay() {
    if (this.replay) {
      this.stopReplay();
      return;
    }
    const last = this.answer.run.rounds.length - 1;
    this.show(this.shown >= last ? Math.min(1, last) : this.shown, true);
    byId("replay").textContent = "Pause";
    this.replay = setInterval(() => {
      if (this.shown >= last) this.stopReplay();
      else this.show(this.shown + 1, true);
    }, REPLAY_MS);
  }

  stopReplay() {
    clearInterval(this.replay);
    this.replay = null;
    byId("replay").textContent = "Replay slowly";
  }
}

/** The round to leave on show at the end: the latest that has everything, as the very last one may be cut short. */
function lastTelling(rounds) {
  const hasAll = (round) => round.accepted_rows.length > 1 && round.token_texts.length > round.accepted_rows.length;
  const index = rounds.findLastIndex(hasAll);
  return index < 0 ? rounds.length - 1 : index;
}
