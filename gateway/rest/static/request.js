// From the form to a request, and from a refused field back to its input.

const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
const SPECULATION_NUMBERS = ["max_levels", "width", "max_nodes", "layer_parallel_size"];
const SEED_LIMIT = 2 ** 32;

const byId = (id) => document.getElementById(id);

/** What a number input holds; undefined if it is empty. What is no number is sent as it stands, to be refused by name. */
function numberIn(id) {
  const input = byId(id);
  if (input.validity.badInput) return "not a number";
  return input.value === "" ? undefined : Number(input.value);
}

function given(ids) {
  return Object.fromEntries(ids.map((id) => [id, numberIn(id)]).filter(([, value]) => value !== undefined));
}

export function kind() {
  return document.querySelector("input[name=kind]:checked").value;
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
  byId("model-field").hidden = names.length < 2;
  if (names.join("\n") === offered.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes(chosen)) select.value = chosen;
}

/** Path and body. A seed is drawn here if none is given, for the race runs twice with the same one. */
export function requestOf() {
  const body = { ...model(), ...given(NUMBERS), seed: numberIn("seed") ?? Math.floor(Math.random() * SEED_LIMIT) };
  if (byId("stop_text").value) body.stop = byId("stop_text").value;
  if (byId("ignore_eos").checked) body.ignore_eos = true;
  body.speculation = { mode: byId("mode").value, ...given(SPECULATION_NUMBERS), trace: true };
  if (kind() === "completion") return { path: "/v1/completions", body: { prompt: byId("prompt").value, ...body } };
  const system = byId("system").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: byId("prompt").value }];
  return { path: "/v1/chat/completions", body: { messages, ...body } };
}

/** The same request without speculation. */
export function plainOf({ path, body }) {
  return { path, body: { ...body, speculation: { mode: "off", trace: true } } };
}

/** Mark the input that a refusal names, and go there; false if it names none of ours. */
export function markRefused(param) {
  unmarkAll();
  const name = param?.startsWith("messages") ? "prompt" : param;
  const input = name ? document.querySelector(`[name="${CSS.escape(name)}"]`) : null;
  if (!input) return false;
  input.setAttribute("aria-invalid", "true");
  input.closest("details")?.setAttribute("open", "");
  input.focus();
  return true;
}

export function unmarkAll() {
  for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}
