// The tokens of an answer, coloured by probability; the alternatives of one show when it is pointed at or focused.

/** `tokens`: OpenAI's logprobs.content. */
export function showTokens(element, tokens) {
  const card = document.createElement("div");
  card.className = "card";
  card.hidden = true;
  const line = document.createElement("div");
  line.className = "line";
  for (const { shown, token, logprob, top } of joined(tokens)) {
    const span = document.createElement("button");
    span.type = "button";
    span.className = `token p${Math.min(4, Math.floor(Math.exp(logprob) * 5))}`;
    span.textContent = visible(shown);
    const open = () => fill(card, token, logprob, top, span);
    span.addEventListener("pointerenter", open);
    span.addEventListener("focus", open);
    line.append(span);
    if (shown.includes("\n")) line.append(document.createElement("br"));
  }
  element.addEventListener("pointerleave", () => (card.hidden = true));
  element.append(line, card);
}

/** Tokens that are parts of one character show it once, at its last part. */
function joined(tokens) {
  const decoder = new TextDecoder();
  return tokens.map(({ token, logprob, bytes, top_logprobs: top }) => {
    const shown = bytes ? decoder.decode(new Uint8Array(bytes), { stream: true }) : token;
    return { shown, token, logprob, top: top ?? [] };
  });
}

function visible(text) {
  return text === "" ? "·" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function fill(card, token, logprob, top, span) {
  const rows = top.some((other) => other.token === token) ? top : [{ token, logprob }, ...top];
  const table = document.createElement("table");
  for (const other of rows) {
    const row = table.insertRow();
    row.className = other.token === token ? "chosen" : "";
    row.insertCell().textContent = visible(other.token);
    row.insertCell().textContent = `${(100 * Math.exp(other.logprob)).toFixed(1)} %`;
    const meter = document.createElement("meter");
    meter.value = Math.exp(other.logprob);
    row.insertCell().append(meter);
  }
  card.replaceChildren(table);
  card.hidden = false;
  const width = card.parentElement.clientWidth;
  card.style.left = `${Math.max(0, Math.min(span.offsetLeft, width - card.offsetWidth))}px`;
  card.style.top = `${span.offsetTop + span.offsetHeight + 4}px`;
}
