// Talks to the server: JSON, and answers that come as server-sent events.

/** What the server said against a request, in its own sentence. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Text in any pieces to the data of whole events; what is left waits for its rest. */
export class Events {
  #rest = "";

  add(text) {
    const parts = (this.#rest + text).split("\n\n");
    this.#rest = parts.pop();
    return parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice("data: ".length));
  }
}

async function ask(path, options, key) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

/** The JSON at an address. */
export async function read(path, key = "") {
  return (await ask(path, {}, key)).json();
}

/** The events of an answer, as they come. Throws `ServerError` for what the server has against it, at any time. */
export async function* stream(path, body, { key = "", signal } = {}) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal }, key);
  const events = new Events();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done) throw new ServerError("The answer broke off: the connection to the server is gone.");
    for (const data of events.add(part.value)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message);
      yield event;
    }
  }
}
