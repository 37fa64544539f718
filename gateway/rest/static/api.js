// The gateway's REST API as this page uses it.

const KEY_NAME = "easyspec.api_key";

/** A refusal or failure, as the gateway's error body has it. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY_NAME),
  set: (key) => (key ? sessionStorage.setItem(KEY_NAME, key) : sessionStorage.removeItem(KEY_NAME)),
};

function headers() {
  const key = apiKey.get();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function errorOf(response) {
  let body;
  try {
    body = (await response.json()).error;
  } catch {
    body = null;
  }
  return new ApiError(response.status, body ?? { message: `the gateway answered with status ${response.status}` });
}

/** The JSON behind a path; ApiError if the gateway refuses. */
export async function getJson(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/** Chunks of a streamed completion, parsed. Aborting the signal ends it here and in the gateway. */
export async function* streamCompletion(path, body, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error);
    yield chunk;
  }
  throw new ApiError(response.status, { message: "the stream ended too early: the connection was lost" });
}

/** The data of each server-sent event of a byte stream. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
