// Reads server-sent events from a response's body. It knows nothing of what the events say.

const MAX_EVENT_CHARACTERS = 4 * 1024 * 1024;
const MAX_SILENCE_MS = 90_000;

/** The server said nothing for too long, or more than one event may hold. */
export class BrokenStream extends Error {}

/**
 * Yield {id, data} of each event; comments only prove that the line is alive.
 * Throws BrokenStream after 90 s of silence and for an event of more than 4 Mi characters.
 */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  try {
    for (;;) {
      const { value, done } = await withinSilence(reader.read());
      if (done) return;
      buffered += value;
      if (buffered.length > MAX_EVENT_CHARACTERS) throw new BrokenStream("an event has no end");
      const blocks = buffered.split(/\r?\n\r?\n/);
      buffered = blocks.pop();
      for (const block of blocks) {
        const event = parseEvent(block);
        if (event.data !== "") yield event;
      }
    }
  } finally {
    // Closing the stream is what tells the server that nobody reads on.
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  const event = { id: "", data: "" };
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    if (colon <= 0) continue;
    const name = line.slice(0, colon);
    const value = line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") event.data += (event.data ? "\n" : "") + value;
    else if (name === "id") event.id = value;
  }
  return event;
}

async function withinSilence(promise) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new BrokenStream("the server went silent")), MAX_SILENCE_MS);
  });
  try {
    return await Promise.race([promise, silence]);
  } finally {
    clearTimeout(timer);
  }
}
