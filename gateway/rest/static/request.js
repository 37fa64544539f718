// From the settings to a request, and from a refused field back to its input.

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const SPECULATION_NUMBERS = ["max_levels", "width", "max_nodes", "layer_parallel_size"];
const SEED_LIMIT = 2 ** 32;

const byId = (id) => document.getElementById(id);

/** What a number input holds; undefined if it is empty. What is not a number is sent as it stands, to be refused by name. */
function numberIn(id) {
  const input = byId(id);
  if (input.validity.badInput) return "not a number";
  return input.value === "" ? undefined : Number(input.value);
}

function given(ids) {
  return Object.fromEntries(ids.map((id) => [id, numberIn(id)]).filter(([, value]) => value !== undefined));
}

/** Whether a message is a turn of a chat (or a text to go on with). */
export function isChat() {
  return document.querySelector("input[name=kind]:checked").value === "chat";
}

/** The model to ask where there are several; otherwise nothing, and the gateway's only one answers. */
function model() {
  const select = byId("model");
  return select.options.length > 1 ? { model: select.value } : {};
}

/** Offer these models, without changing what was chosen. */
export function offerModels(names) {
  const select = byId("model");
  const offered = [...select.options].map((option) => option.value);
  select.hidden = names.length < 2;
  if (names.join("\n") === offered.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) select.value = chosen;
}

/** What every request says, whatever is asked. A seed is drawn here if none is given: a race runs with the same one. */
function common() {
  const body = { ...model(), ...given(NUMBERS), seed: numberIn("seed") ?? Math.floor(Math.random() * SEED_LIMIT) };
  if (byId("stop_text").value) body.stop = byId("stop_text").value;
  if (byId("ignore_eos").checked) body.ignore_eos = true;
  body.speculation = { mode: byId("mode").value, ...given(SPECULATION_NUMBERS), trace: true };
  return body;
}

/** Path and body of a chat's next turn; `turns` are [{role, content}] and end with what the user says. */
export function chatRequest(turns) {
  const system = byId("system").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns];
  return { path: "/v1/chat/completions", body: { messages, ...common() } };
}

/** Path and body for a text to go on with. */
export function completionRequest(prompt) {
  return { path: "/v1/completions", body: { prompt, ...common() } };
}

/** The same request without speculation. */
export function plainOf({ path, body }) {
  return { path, body: { ...body, speculation: { mode: "off", trace: true } } };
}

/** Mark the setting that a refusal names, and return it; null if it names none. */
export function markRefused(param) {
  unmarkAll();
  const input = param ? document.querySelector(`#settings [name="${CSS.escape(param)}"]`) : null;
  input?.setAttribute("aria-invalid", "true");
  return input;
}

export function unmarkAll() {
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}
