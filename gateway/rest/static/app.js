// The page: runs requests and shows what they do.

import { ApiError, apiKey, getJson, streamCompletion } from "./api.js";
import { drawLane, drawLevels, drawStages, drawTotals, raceResult } from "./charts.js";
import { kind, markRefused, offerModels, plainOf, requestOf, unmarkAll } from "./request.js";
import { Run } from "./run.js";
import { drawTree, inWords } from "./tree.js";

const POLL_MS = 5000;
const REPLAY_MS = 1100;
const TITLES = { 400: "The request was refused", 401: "An API key is needed", 403: "This key may not do that", 404: "Not found here", 413: "The request is too large", 429: "Too many requests at present", 503: "The gateway cannot answer now", 504: "Not done in time" };

// What stands here until the first run: a round as any other.
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
const state = { run: null, plain: null, seed: null, shown: -1, isFollowing: true, abort: null, replay: null, isDrawDue: false };

// --- running ---------------------------------------------------------------------------------------------------

async function start() {
  if (state.abort) return;
  stopReplay();
  hideError();
  unmarkAll();
  const request = requestOf();
  const race = request.body.speculation.mode === "off" ? "none" : byId("race").value;
  Object.assign(state, { run: new Run(), plain: null, seed: request.body.seed, shown: -1, isFollowing: true, abort: new AbortController() });
  clearResults(kind() === "completion" ? request.body.prompt : "");
  setRunning(true);
  say("Generating.");
  try {
    const plain = race === "beside" ? follow(plainOf(request), startPlain()) : null;
    await Promise.all([follow(request, state.run), plain]);
    if (race === "after") {
      byId("verdict").textContent = "Now the same request without speculation…";
      await follow(plainOf(request), startPlain());
    }
    say(`Done: ${state.run.numTokens} tokens. ${byId("verdict").textContent}`);
  } catch (error) {
    const wasStopped = state.abort.signal.aborted && !(error instanceof ApiError);
    state.abort.abort(); // whichever of the two still runs
    if (wasStopped) say("Stopped.");
    else showError(error);
  } finally {
    setRunning(false);
    draw();
  }
}

function startPlain() {
  state.plain = new Run();
  return state.plain;
}

async function follow({ path, body }, run) {
  for await (const chunk of streamCompletion(path, body, state.abort.signal)) {
    const round = run.take(chunk);
    if (round && run === state.run) appendRound(round);
    drawSoon();
  }
}

function setRunning(isRunning) {
  if (!isRunning) state.abort = null;
  byId("run").disabled = isRunning;
  byId("stop").disabled = !isRunning;
  byId("answer").setAttribute("aria-busy", String(isRunning));
}

function say(text) {
  byId("status").textContent = text;
}

// --- showing ---------------------------------------------------------------------------------------------------

function clearResults(prompt) {
  const before = document.createElement("span");
  before.className = "prompt";
  before.textContent = prompt;
  byId("answer").replaceChildren(before);
  byId("verdict").textContent = "Running…";
  byId("tree").replaceChildren();
  byId("totals").replaceChildren();
  byId("round-name").textContent = "";
  byId("tree-words").textContent = "The first round reads the prompt.";
  for (const id of ["round", "previous", "next", "replay"]) byId(id).disabled = true;
}

function appendRound(round) {
  const answer = byId("answer");
  const isAtEnd = answer.scrollTop + answer.clientHeight >= answer.scrollHeight - 40;
  // Tokens that hold parts of characters have no text of their own: then the round's text is shown as one.
  const isOneToOne = round.token_texts.join("") === round.text;
  const texts = isOneToOne ? round.token_texts : [round.text];
  texts.forEach((text, i) => {
    const token = document.createElement("span");
    token.className = `t ${i < round.accepted_rows.length ? "accepted" : "bonus"}`;
    token.dataset.round = round.index;
    token.textContent = text;
    answer.append(token);
  });
  if (isAtEnd) answer.scrollTop = answer.scrollHeight;
}

function drawSoon() {
  if (state.isDrawDue) return;
  state.isDrawDue = true;
  requestAnimationFrame(() => {
    state.isDrawDue = false;
    draw();
  });
}

function draw() {
  const { run, plain } = state;
  if (!run) return;
  const fastest = Math.max(run.speed ?? 0, plain?.speed ?? 0);
  const isPlainOnly = byId("mode").value === "off" && !plain && run.numDraftRounds === 0;
  drawLane(byId("lane-drafted"), isPlainOnly ? null : run, fastest);
  drawLane(byId("lane-plain"), isPlainOnly ? run : plain, fastest);
  drawVerdict();
  drawLevels(byId("levels"), run);
  drawStages(byId("stages"), byId("stage-means"), run);
  if (!run.rounds.length) return;
  drawTotals(byId("totals"), run, state.seed);
  if (state.isFollowing) showRound(state.abort ? run.rounds.length - 1 : lastTelling(run.rounds), false);
}

/** The round to leave on show at the end: the latest that has everything, as the very last one may be cut short. */
function lastTelling(rounds) {
  const hasAll = (round) => round.accepted_rows.length > 1 && round.token_texts.length > round.accepted_rows.length;
  const index = rounds.findLastIndex(hasAll);
  return index < 0 ? rounds.length - 1 : index;
}

function drawVerdict() {
  if (state.abort && !(state.plain?.speed > 0)) return;
  const result = raceResult(state.run, state.plain);
  const verdict = byId("verdict");
  if (!result) {
    if (!state.abort) verdict.textContent = state.run.numTokens ? "No race this time." : "";
    return;
  }
  const times = document.createElement("b");
  times.textContent = `${result.factor.toFixed(2)}×`;
  if (state.abort || !state.plain.finishReason || !state.run.finishReason) {
    verdict.replaceChildren(times, " the speed of plain decoding so far");
    return;
  }
  const badge = document.createElement("span");
  badge.className = result.isSame ? "same" : "differs";
  badge.textContent = result.isSame ? "✓ identical text" : "✗ the texts differ";
  const passes = ` the speed of plain decoding: ${state.run.rounds.length} passes of the base model instead of ${state.plain.rounds.length}, `;
  verdict.replaceChildren(times, passes, badge);
}

/** Show a round's tree and mark its tokens; `isChosen` if a person asked for it. */
function showRound(index, isChosen) {
  const rounds = state.run?.rounds ?? [];
  const round = rounds[index];
  if (!round) return;
  if (isChosen) state.isFollowing = index === rounds.length - 1;
  if (state.shown !== index) {
    state.shown = index;
    drawTree(byId("tree"), round);
    byId("tree-words").textContent = inWords(round);
    markTokens(index);
  }
  byId("round-name").textContent = `round ${index + 1} of ${rounds.length}`;
  const slider = byId("round");
  slider.max = rounds.length - 1;
  slider.value = index;
  slider.setAttribute("aria-valuetext", `round ${index + 1} of ${rounds.length}: ${inWords(round)}`);
  slider.disabled = rounds.length < 2;
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === rounds.length - 1;
  byId("replay").disabled = rounds.length < 2 || state.abort !== null;
}

function markTokens(index) {
  for (const token of byId("answer").querySelectorAll(".now")) token.classList.remove("now");
  for (const token of byId("answer").querySelectorAll(`[data-round="${index}"]`)) token.classList.add("now");
}

function choose(index) {
  stopReplay();
  showRound(index, true);
}

function toggleReplay() {
  if (state.replay) {
    stopReplay();
    return;
  }
  const last = state.run.rounds.length - 1;
  showRound(state.shown >= last ? Math.min(1, last) : state.shown, true);
  byId("replay").textContent = "Pause";
  state.replay = setInterval(() => {
    if (state.shown >= last) stopReplay();
    else showRound(state.shown + 1, true);
  }, REPLAY_MS);
}

function stopReplay() {
  clearInterval(state.replay);
  state.replay = null;
  byId("replay").textContent = "Replay slowly";
}

// --- errors and the service ------------------------------------------------------------------------------------

function showError(error) {
  const needsKey = error.status === 401;
  byId("error-title").textContent = TITLES[error.status] ?? (error instanceof ApiError ? "It did not work" : "The gateway cannot be reached");
  byId("error-message").textContent = error.message;
  byId("key-form").hidden = !needsKey;
  byId("error").hidden = false;
  byId("verdict").textContent = "";
  if (!state.run.rounds.length) byId("tree-words").textContent = "";
  if (needsKey) byId("api-key").focus();
  else if (!markRefused(error.param)) byId("error").scrollIntoView({ block: "nearest" });
}

function hideError() {
  byId("error").hidden = true;
  byId("key-form").hidden = true;
}

async function lookAtService() {
  try {
    const health = await getJson("/health");
    const hasDrafter = health.drafter === "ready";
    const isReady = health.verifier === "ready";
    const drafter = health.drafter === "none" ? "no drafter: plain decoding only" : `drafter ${health.drafter}`;
    const models = isReady ? await modelNames() : "";
    showService(isReady ? (hasDrafter ? "ready" : "part") : "down", `${models}verifier ${health.verifier}, ${drafter}`);
  } catch (error) {
    showService("down", error instanceof ApiError ? error.message : "the gateway cannot be reached");
  }
}

async function modelNames() {
  try {
    const { data } = await getJson("/v1/models");
    const names = data.map(({ id }) => id);
    offerModels(names);
    return `${names.length > 1 ? "models" : "model"} ${names.join(", ")}: `;
  } catch {
    return ""; // it wants a key, which the first request will ask for
  }
}

function showService(name, text) {
  document.querySelector(".dot").dataset.state = name;
  byId("service-text").textContent = text;
}

function showKind() {
  const isChat = kind() === "chat";
  document.querySelector(".chat-only").hidden = !isChat;
  byId("prompt-label").textContent = isChat ? "Your message" : "Text to continue";
  byId("ignore_eos").checked = !isChat;
}

// --- events ----------------------------------------------------------------------------------------------------

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
byId("form").addEventListener("change", (event) => {
  if (event.target.name === "kind") showKind();
});
byId("stop").addEventListener("click", () => state.abort?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    state.abort?.abort();
    stopReplay();
  } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("api-key").value.trim());
  byId("api-key").value = "";
  lookAtService();
  start();
});
byId("answer").addEventListener("click", (event) => {
  const round = event.target.dataset?.round;
  if (round !== undefined) choose(Number(round));
});
byId("round").addEventListener("input", () => choose(Number(byId("round").value)));
byId("previous").addEventListener("click", () => choose(state.shown - 1));
byId("next").addEventListener("click", () => choose(state.shown + 1));
byId("replay").addEventListener("click", toggleReplay);

if (window.matchMedia("(max-width: 860px)").matches) {
  for (const details of document.querySelectorAll("details")) details.open = false; // what matters is below
}
drawTree(byId("tree"), EXAMPLE);
byId("tree-words").textContent = `For example: ${inWords(EXAMPLE)}`;
showKind();
lookAtService();
setInterval(() => {
  if (!document.hidden) lookAtService();
}, POLL_MS);
