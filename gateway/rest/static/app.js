// The page: asks, shows what comes, and says what to do when nothing does.

import { ApiError, apiKey, getJson, streamCompletion } from "./api.js";
import { Answer, Conversation } from "./conversation.js";
import { Inside } from "./inside.js";
import { chatRequest, completionRequest, isChat, markRefused, offerModels, plainOf, unmarkAll } from "./request.js";
import { Run } from "./run.js";

const POLL_MS = 5000;
const THEME_NAME = "easyspec.theme";
const THEMES = { "": "as the system has them", light: "light", dark: "dark" };
const PROBLEMS = {
  400: ["The request was refused", "Change what it names, and send again."],
  401: ["An API key is needed", ""],
  403: ["This key may not do that", "Another key may, or another model."],
  404: ["Not found here", "The model may be gone: reload the page to see what is served."],
  413: ["The message is too large", "Shorten it, or start a new chat."],
  429: ["Too many requests at present", "Wait a moment, then try again."],
  503: ["The model cannot answer now", "It may still be loading: wait until the dot above is green. “easyspec doctor” says what is missing."],
  504: ["Not done in time", "Try again, or lower max tokens in the settings."],
};
const UNREACHABLE = ["The gateway cannot be reached", "Is “easyspec up” (or “make serve”) still running in its terminal? Start it again, then try again."];
const LOST = ["The answer broke off", "Try again: what had come stays until then."];
const TOO_LONG = "The conversation no longer fits the model: start a new chat, or shorten the message.";
const IDEAS = {
  chat: ["What is the capital of France?", "Explain why the sky is blue, in three sentences.", "Write a Python function that checks whether a word is a palindrome.", "Give me a recipe for pancakes as a numbered list."],
  completion: ['class Stack:\n    """A stack of items."""\n\n    def push(self, item):', "The history of the lighthouse begins"],
};

const byId = (id) => document.getElementById(id);
const conversation = new Conversation(byId("turns"));
const inside = new Inside();
const state = { abort: null, isDrawDue: false, running: null };

// --- asking ----------------------------------------------------------------------------------------------------

/** Send what stands in the message box. */
function send() {
  const text = byId("message").value;
  if (state.abort || !text.trim()) return;
  byId("message").value = "";
  grow();
  ask(text);
}

/** Ask, and put the message back into its box if no answer comes. */
async function ask(text) {
  const before = isChat() ? conversation.messages() : [];
  const request = isChat() ? chatRequest([...before, { role: "user", content: text }]) : completionRequest(text);
  const answer = new Answer(request, new Run(), isChat() ? null : text);
  connect(answer);
  conversation.add(text, answer);
  byId("welcome").hidden = true;
  inside.follow(answer);
  scrollDown();
  await run(answer, request, answer.run);
  if (answer.run.numTokens || answer.run.text) return;
  conversation.drop();
  byId("welcome").hidden = conversation.last !== null;
  if (conversation.last) inside.follow(conversation.last.answer);
  else inside.clear();
  if (!byId("message").value) byId("message").value = text;
  grow();
}

/** Answer the last message once more. */
function askAgain() {
  if (state.abort || !conversation.last) return;
  const { question } = conversation.drop();
  ask(question);
}

async function race() {
  const { answer } = inside;
  if (state.abort || !answer) return;
  answer.plain = new Run();
  await run(answer, plainOf(answer.request), answer.plain);
  if (!answer.plain.finishReason) answer.plain = null;
  inside.draw(false);
}

/** Stream a request into a run; what goes wrong is told. */
async function run(answer, { path, body }, into) {
  hideProblem();
  state.abort = new AbortController();
  state.running = answer;
  setRunning(true);
  say(into === answer.run ? "Answering." : "Decoding the same without speculation.");
  try {
    for await (const chunk of streamCompletion(path, body, state.abort.signal)) {
      into.take(chunk);
      drawSoon();
    }
    say(into === answer.run ? answer.run.text || "No text came." : byId("verdict").textContent);
  } catch (error) {
    if (state.abort.signal.aborted && !(error instanceof ApiError)) say("Stopped.");
    else showProblem(error, into.numTokens > 0);
  } finally {
    const isAtEnd = isScrolledDown();
    state.abort = state.running = null;
    setRunning(false);
    answer.draw(false);
    inside.draw(false);
    if (isAtEnd) scrollDown();
  }
}

function setRunning(isRunning) {
  byId("send").hidden = isRunning;
  byId("stop").hidden = !isRunning;
  byId("new-chat").disabled = isRunning || !conversation.last;
  for (const { answer } of conversation.turns) answer.again.disabled = isRunning;
}

function say(text) {
  byId("status").textContent = text;
}

function newChat() {
  if (state.abort) return;
  conversation.clear();
  inside.clear();
  hideProblem();
  byId("welcome").hidden = false;
  byId("new-chat").disabled = true;
  byId("message").focus();
}

// --- showing ---------------------------------------------------------------------------------------------------

function connect(answer) {
  answer.copy.addEventListener("click", () => copy(answer.run.text, answer.copy));
  answer.again.addEventListener("click", askAgain);
  answer.look.addEventListener("click", () => lookInto(answer));
  answer.body.addEventListener("click", (event) => {
    const code = event.target.closest?.(".copy-code");
    if (code) copy(code.closest(".code").querySelector("code").textContent, code);
    const round = event.target.dataset?.round;
    if (round === undefined || !document.body.classList.contains("coloured")) return;
    lookInto(answer);
    inside.choose(Number(round));
  });
}

function lookInto(answer) {
  if (inside.answer !== answer) inside.follow(answer);
  inside.setOpen(true);
  inside.draw(state.running === answer);
  byId("inside-title").focus({ preventScroll: true });
}

function toggleInside() {
  inside.setOpen(!inside.isOpen);
  if (inside.isOpen) byId("inside-title").focus({ preventScroll: true });
}

function closeInside() {
  inside.setOpen(false);
  byId("message").focus();
}

function drawSoon() {
  if (state.isDrawDue) return;
  state.isDrawDue = true;
  requestAnimationFrame(() => {
    state.isDrawDue = false;
    if (!state.running) return;
    const isAtEnd = isScrolledDown();
    state.running.draw(state.running.plain === null);
    inside.draw(true);
    if (isAtEnd) scrollDown();
  });
}

function isScrolledDown() {
  const thread = byId("thread");
  return thread.scrollTop + thread.clientHeight >= thread.scrollHeight - 60;
}

function scrollDown() {
  byId("thread").scrollTop = byId("thread").scrollHeight;
}

async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here"; // a page from elsewhere over plain HTTP may not
  }
  say(button.textContent);
  setTimeout(() => (button.textContent = label), 1500);
}

function grow() {
  const box = byId("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

// --- problems and the service ----------------------------------------------------------------------------------

function showProblem(error, hasTokens) {
  const isLost = !(error instanceof ApiError) || error.status === 200;
  const [title, advice] = isLost ? (hasTokens ? LOST : UNREACHABLE) : (PROBLEMS[error.status] ?? ["It did not work", "Try again; “easyspec doctor” may say why."]);
  const needsKey = error.status === 401;
  byId("problem-title").textContent = title;
  byId("problem-message").textContent = error.message;
  byId("problem-advice").textContent = error.code === "context_length_exceeded" ? TOO_LONG : advice;
  byId("key-form").hidden = !needsKey;
  byId("retry").hidden = needsKey;
  byId("problem").hidden = false;
  const refused = markRefused(error.param);
  if (refused) {
    byId("refused").textContent = error.message;
    byId("refused").hidden = false;
    byId("settings").showModal();
    refused.focus();
  } else if (needsKey) byId("api-key").focus();
  scrollDown();
}

function hideProblem() {
  byId("problem").hidden = true;
  byId("refused").hidden = true;
  unmarkAll();
}

/** What failed, once more: a message that got no answer is back in its box, a half answer is the last one. */
function retry() {
  if (byId("message").value.trim()) send();
  else askAgain();
}

async function lookAtService() {
  try {
    const health = await getJson("/health");
    const isReady = health.verifier === "ready";
    const isWhole = isReady && health.drafter === "ready";
    const drafter = { ready: "", none: ", plain decoding" }[health.drafter] ?? `, drafter ${health.drafter}`;
    const names = isReady ? await modelNames() : null;
    const model = names?.length === 1 ? names[0] : "";
    showService(isWhole ? "ready" : isReady ? "part" : "down", isReady ? `${model}${drafter}` : `model ${health.verifier}`);
  } catch (error) {
    showService("down", error instanceof ApiError ? error.message : "gateway not reached");
  }
}

async function modelNames() {
  try {
    const { data } = await getJson("/v1/models");
    const names = data.map(({ id }) => id);
    offerModels(names);
    return names;
  } catch {
    return null; // it wants a key, which the first request will ask for
  }
}

function showService(name, text) {
  const words = { ready: "ready", part: "ready, but not all of it", down: "not ready", unknown: "" };
  document.querySelector(".dot").dataset.state = name;
  byId("service-text").textContent = text;
  document.querySelector(".service").title = words[name];
}

// --- settings --------------------------------------------------------------------------------------------------

function showKind() {
  document.querySelector(".chat-only").hidden = !isChat();
  byId("message").placeholder = isChat() ? "Ask something" : "Begin a text";
  byId("message-label").textContent = isChat() ? "Your message" : "Text to go on with";
  byId("welcome-title").textContent = isChat() ? "What would you like to know?" : "How does the text begin?";
  byId("ideas").replaceChildren(
    ...IDEAS[isChat() ? "chat" : "completion"].map((idea) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: idea });
      button.addEventListener("click", () => !state.abort && ask(idea));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

function showColours() {
  document.body.classList.toggle("coloured", byId("show-guesses").checked);
}

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  for (const attribute of ["aria-label", "title"]) byId("theme").setAttribute(attribute, `Colours: ${THEMES[name]}`);
  try {
    localStorage.setItem(THEME_NAME, name);
  } catch {
    // it lasts as long as the page then
  }
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length]);
}

function rememberedTheme() {
  try {
    const name = localStorage.getItem(THEME_NAME) ?? "";
    return name in THEMES ? name : "";
  } catch {
    return "";
  }
}

// --- events ----------------------------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("message").addEventListener("input", grow);
byId("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || byId("settings").open) return;
  if (state.abort) state.abort.abort();
  else if (inside.isOpen) closeInside();
});
byId("stop").addEventListener("click", () => state.abort?.abort());
byId("new-chat").addEventListener("click", newChat);
byId("look-inside").addEventListener("click", toggleInside);
byId("close-inside").addEventListener("click", closeInside);
byId("open-settings").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("click", (event) => {
  if (event.target === byId("settings")) byId("settings").close(); // beside it
});
byId("settings-form").addEventListener("change", showKind);
byId("show-guesses").addEventListener("change", showColours);
byId("theme").addEventListener("click", nextTheme);
byId("retry").addEventListener("click", retry);
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("api-key").value.trim());
  byId("api-key").value = "";
  lookAtService();
  retry();
});
byId("race").addEventListener("click", race);
byId("round").addEventListener("input", () => inside.choose(Number(byId("round").value)));
byId("previous").addEventListener("click", () => inside.choose(inside.shown - 1));
byId("next").addEventListener("click", () => inside.choose(inside.shown + 1));
byId("replay").addEventListener("click", () => inside.toggleReplay());

setTheme(rememberedTheme());
showKind();
showColours();
lookAtService();
setInterval(() => {
  if (!document.hidden) lookAtService();
}, POLL_MS);
