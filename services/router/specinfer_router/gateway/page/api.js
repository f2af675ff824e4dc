// Calls the server: the model's facts, readiness, and streams that resume themselves.
// It knows the HTTP API and nothing of the page, of conversations or of what is drawn.

import { readEvents } from "./sse.js";

const MAX_RESUMES = 5;
const FIRST_PAUSE_MS = 250;
const KEY_NAME = "specinfer.key";
// Errors in mid-stream after which the same session goes on.
const RESUMABLE = /unavailable|exhausted|stalled|overloaded|rate_limit/i;

/** A request that failed; `status` is 0 when no answer came. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = "", retryMs = 0, cursor = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryMs, cursor });
  }
}

/** The API key is kept until the tab closes, and only when the browser lets us. */
export const apiKey = {
  memory: "",
  get() {
    try {
      return sessionStorage.getItem(KEY_NAME) ?? this.memory;
    } catch {
      return this.memory;
    }
  },
  set(key) {
    this.memory = key;
    try {
      sessionStorage.setItem(KEY_NAME, key);
    } catch {
      // The memory holds it while the page lives.
    }
  },
};

/** The first model of /v1/models with its `specinfer` facts. Throws ApiError. */
export async function fetchModel() {
  const response = await call("v1/models", { headers: headers() });
  const body = await response.json();
  return body.data[0];
}

/** {ready, reason} of the cluster. Throws ApiError when nobody answers. */
export async function fetchReadiness() {
  const response = await reach("health/ready", { headers: headers() });
  const body = await response.json().catch(() => ({}));
  return { ready: response.ok, reason: body.reason ?? "" };
}

/**
 * Stream one request and yield its chunks; a stream that breaks is resumed where it was.
 *
 * @param path "v1/chat/completions" or "v1/completions"
 * @param body the request; `stream` is set here
 * @param options signal, cursor (the id to go on after, or ""), onResume(number of the try)
 * Throws ApiError; its `cursor` tells where a later call may go on, "" where it may not.
 */
export async function* streamChunks(path, body, { signal, cursor = "", onResume = () => {} }) {
  const text = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  let position = cursor;
  let numTries = 0;
  let begun = false;
  for (;;) {
    try {
      const response = await call(path, request(text, position, signal));
      begun = true;
      for await (const event of readEvents(response.body)) {
        if (event.data === "[DONE]") return;
        const chunk = parse(event.data);
        if (chunk.error) throw failed(chunk.error);
        if (event.id) position = event.id;
        numTries = 0;
        yield chunk;
      }
      throw new ApiError("The connection closed before the answer was complete.");
    } catch (error) {
      if (signal.aborted) return;
      // Nothing came yet: with its seed the same request gives the same tokens from the start.
      if (!resumable(error, position || begun) || ++numTries > MAX_RESUMES) throw final(error, position);
      onResume(numTries);
      await pause(Math.max(error.retryMs ?? 0, FIRST_PAUSE_MS * 2 ** (numTries - 1)), signal);
      if (signal.aborted) return;
    }
  }
}

function request(text, cursor, signal) {
  const extra = { "content-type": "application/json" };
  if (cursor) extra["last-event-id"] = cursor;
  return { method: "POST", body: text, signal, headers: headers(extra) };
}

function headers(extra = {}) {
  const key = apiKey.get();
  return key ? { ...extra, authorization: `Bearer ${key}` } : extra;
}

async function call(path, options) {
  const response = await reach(path, options);
  if (!response.ok) throw await refused(response);
  return response;
}

async function reach(path, options) {
  try {
    return await fetch(new URL(path, document.baseURI), { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function refused(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  const retryMs = Number(response.headers.get("retry-after-ms") ?? 0);
  return new ApiError(error.message ?? `The server answered ${response.status}.`, {
    status: response.status,
    code: String(error.code ?? error.type ?? ""),
    param: error.param ?? "",
    retryMs,
  });
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent a chunk that is no JSON.");
  }
}

function failed(error) {
  const code = `${error.code ?? ""} ${error.type ?? ""}`;
  // A status of 500 in mid-stream stands for "this will not get better".
  const status = RESUMABLE.test(code) ? 0 : 500;
  return new ApiError(error.message ?? "The server gave the answer up.", { status, code });
}

/** Only what broke after the session began can go on, and only when time may heal it. */
function resumable(error, cursor) {
  if (!cursor) return false;
  return !(error instanceof ApiError) || [0, 429, 502, 503, 504].includes(error.status);
}

function final(error, cursor) {
  const known = error instanceof ApiError ? error : new ApiError("The stream broke.");
  known.cursor = resumable(known, cursor) ? cursor : "";
  return known;
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
