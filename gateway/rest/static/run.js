// One streamed completion: its rounds, and what can be counted of them.

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
    this.thought = "";
    this.spans = []; // {start, end, kind, round}: whose words a stretch of the text is
    this.coloured = 0; // characters of the text that have a span
    this.rounds = [];
    this.finishReason = null;
    this.usage = null;
    this.numTokens = 0;
    this.numAccepted = 0;
    this.levels = []; // [drafted, accepted] rounds by level
    this.laterMs = 0; // of every round but the first, which holds the prompt
    this.laterTokens = 0;
    this.firstMs = 0;
  }

  /** Take a chunk, of either endpoint; returns the round it holds, or null. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return null;
    this.thought += choice.delta?.reasoning_content ?? "";
    this.text += choice.text ?? choice.delta?.content ?? "";
    this.finishReason = choice.finish_reason ?? this.finishReason;
    if (!chunk.easyspec) return null;
    const round = { ...chunk.easyspec, index: this.rounds.length, lastToken: this.lastToken() };
    this.rounds.push(round);
    this.colour(round);
    this.count(round);
    return round;
  }

  /** Say whose words the new part of the text is. */
  colour(round) {
    const fresh = this.text.slice(this.coloured);
    // Tokens that hold parts of characters, or are not part of the text, have no text of their own: then it is one span.
    const isOneToOne = round.token_texts.join("") === fresh;
    const texts = isOneToOne ? round.token_texts : [fresh];
    const numAccepted = isOneToOne || round.accepted_rows.length === round.token_texts.length ? round.accepted_rows.length : 0;
    texts.forEach((text, i) => {
      const start = this.coloured;
      this.coloured += text.length;
      if (text) this.spans.push({ start, end: this.coloured, kind: i < numAccepted ? "accepted" : "bonus", round: round.index });
    });
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

  /** Per round behind which something was drafted ahead: the milliseconds it had taken by then, 0 for a wrong guess. */
  get ahead() {
    return this.rounds.map((round) => round.ahead_ms).filter((ms) => ms !== null && ms !== undefined);
  }

  get aheadHits() {
    return this.ahead.filter((ms) => ms > 0).length;
  }

  get aheadMs() {
    return this.ahead.reduce((sum, ms) => sum + ms, 0);
  }

  /** Tokens per second after the first round, by the gateway's clock; null until there are any. */
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
