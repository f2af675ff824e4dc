// What to tell a person about a failed request: what happened and what to do about it.
// It knows ApiError and nothing of the page.

/** {title, text, retry: label or "", needsKey} for an error of a run. */
export function explain(error) {
  const text = error.message;
  if (error.status === 401) {
    return { title: "This server asks for an API key", text, retry: "", needsKey: true };
  }
  const advice = adviceFor(error);
  return { ...advice, text: [text, advice.text].filter(Boolean).join(" "), needsKey: false };
}

function adviceFor({ status, param, retryMs, cursor }) {
  if (cursor) {
    const text = "What came so far is kept, and the answer can go on from there.";
    return { title: "The stream broke", text, retry: "Go on" };
  }
  if (status === 0) {
    const text = "Check that the server runs and that you are connected.";
    return { title: "No connection", text, retry: "Try again" };
  }
  if (status === 429 || status === 503) {
    const seconds = Math.max(1, Math.round(retryMs / 1000));
    const when = retryMs ? `in ${seconds} second${seconds > 1 ? "s" : ""}` : "in a moment";
    const title = status === 429 ? "The server is busy" : "The server is not ready";
    return { title, text: `Try again ${when}.`, retry: "Try again" };
  }
  if (status === 403) return { title: "This API key may not do that", text: "", retry: "Try again" };
  if (status >= 400 && status < 500) {
    const text = param ? `Change ${param}, then try again.` : "Change the message or the settings.";
    return { title: "The server refused the request", text, retry: "Try again" };
  }
  return { title: "Something went wrong", text: "", retry: "Try again" };
}
