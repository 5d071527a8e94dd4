// The server's API: requests, errors in words, and streams.

export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = ""; // of the API, in memory only

export const useKey = given => { key = given; };

export const get = async (path, signal) => (await ask(path, { signal })).json();
export const post = async (path, body, signal) => (await send(path, body, signal)).json();

// The events of a stream, as they come.
export async function* stream(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(whyNot);
    if (done) throw new Failure("The answer broke off: the connection to the server was lost.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Failure(found.error.message);
      yield found;
    }
  }
}

const send = (path, body, signal) =>
  ask(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

async function ask(path, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" }).catch(whyNot);
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const wait = response.status === 429 && response.headers.get("Retry-After");
  const words = answer?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new Failure(wait ? `${words} (try again in ${wait} s)` : words, response.status);
}

function whyNot(error) {
  if (error.name === "AbortError") throw error;
  throw new Failure("The server cannot be reached. Is it still running?");
}
