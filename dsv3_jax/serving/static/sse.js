// Server-sent events of a fetch response, as parsed JSON. Ends with [DONE] or with the stream.

const MAX_LINE = 4 * 1024 * 1024;

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      if (held.length > MAX_LINE) throw new Error("the server sent a line that is too long");
      let end;
      while ((end = held.search(/\r?\n/)) >= 0) {
        const line = held.slice(0, end);
        held = held.slice(end + (held[end] === "\r" ? 2 : 1));
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the caller may have stopped early: let the server know
  }
}
