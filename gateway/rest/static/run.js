// One streamed completion: its rounds, and what can be counted of them.

/** Text of a choice's chunk, of either endpoint. */
export function textOf(choice) {
  const { reasoning_content: thought, content } = choice.delta ?? {};
  return choice.text ?? (thought ?? "") + (content ?? "");
}

/** Milliseconds of each stage of a round; they add up to the round. */
export function stagesOf(round) {
  const { draft, calibrate, fuzzy, verify, round: total } = round.timings_ms;
  return {
    calibrate,
    fuzzy,
    draft: Math.max(0, draft - calibrate - fuzzy),
    verify,
    overhead: Math.max(0, total - draft - verify),
  };
}

/** The rounds of a completion as they come in. */
export class Run {
  constructor() {
    this.text = "";
    this.unshown = "";
    this.rounds = [];
    this.finishReason = null;
    this.usage = null;
    this.metrics = null;
    this.numTokens = 0;
    this.numAccepted = 0;
    this.levels = []; // [drafted, accepted] rounds by level
    this.laterMs = 0; // of every round but the first, which holds the prompt
    this.laterTokens = 0;
    this.firstMs = 0;
  }

  /** Take a chunk; returns the round it holds, or null. */
  take(chunk) {
    if (chunk.usage) {
      this.usage = chunk.usage;
      this.metrics = chunk.metrics ?? null;
    }
    const choice = chunk.choices[0];
    if (!choice) return null;
    const text = textOf(choice);
    this.text += text;
    this.unshown += text; // thinking comes before its round
    this.finishReason = choice.finish_reason ?? this.finishReason;
    if (!chunk.easyspec) return null;
    const round = { ...chunk.easyspec, text: this.unshown, index: this.rounds.length, lastToken: this.lastToken() };
    this.unshown = "";
    this.rounds.push(round);
    this.count(round);
    return round;
  }

  lastToken() {
    return this.rounds.at(-1)?.token_texts.at(-1) ?? null;
  }

  count(round) {
    this.numTokens += round.token_texts.length;
    this.numAccepted += round.accepted_rows.length;
    if (round.index === 0) {
      this.firstMs = round.timings_ms.round;
    } else {
      this.laterMs += round.timings_ms.round;
      this.laterTokens += round.token_texts.length;
    }
    for (let level = 0; level < depthOf(round.tree); level++) {
      this.levels[level] ??= [0, 0];
      this.levels[level][0] += 1;
      this.levels[level][1] += level < round.accepted_rows.length ? 1 : 0;
    }
  }

  get numDraftRounds() {
    return this.levels[0]?.[0] ?? 0;
  }

  get numDraftTokens() {
    return this.rounds.reduce((sum, round) => sum + round.tree.parent_rows.length, 0);
  }

  /** Tokens a second after the first round, by the gateway's clock; null until there are any. */
  get speed() {
    return this.laterMs ? (this.laterTokens * 1000) / this.laterMs : null;
  }

  /** 1 + accepted tokens / rounds that had a tree; null without any. */
  get meanAcceptanceLength() {
    return this.numDraftRounds ? 1 + this.numAccepted / this.numDraftRounds : null;
  }
}

function depthOf(tree) {
  const depths = [0];
  for (const parent of tree.parent_rows) depths.push(depths[parent] + 1);
  return Math.max(...depths);
}
