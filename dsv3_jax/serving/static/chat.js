// The chat page: sends the conversation to v1/chat/completions and shows the answer as it comes.
// Nothing is stored: conversation, settings and key live in this tab's memory.

import { copyText, showMarkdown } from "./markdown.js";
import { events } from "./sse.js";
import { showTokens } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const input = $("input");

// [{role, content, node}]: what has been said. `running` is the request under way.
let turns = [];
let running = null;
let model = null;

// --- elements -----------------------------------------------------------------------------------------------

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function button(label, action, title = "") {
  const node = make("button", "", label);
  node.type = "button";
  if (title) node.title = title;
  node.addEventListener("click", () => action(node));
  return node;
}

/** Scroll to the end only if the reader is there already. */
function following(change) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (near) log.scrollTop = log.scrollHeight;
  showDown();
}

function showDown() {
  $("down").hidden = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
}

// --- what to send -------------------------------------------------------------------------------------------

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty"];

/** The request's body. Throws a string for a setting that is out of its range. */
function body(messages) {
  const request = { model, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const field = $(name);
    if (!field.validity.valid) throw `${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`;
    if (field.value !== "") request[name] = Number(field.value);
  }
  const stop = $("stops").value.split("\n").filter((line) => line);
  if (stop.length) request.stop = stop;
  if ($("thinking").value) request.thinking = $("thinking").value === "on";
  if ($("alternatives").checked) Object.assign(request, { logprobs: true, top_logprobs: 5 });
  return request;
}

function headers() {
  const key = $("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function history() {
  const system = $("system").value;
  const said = turns.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...said] : said;
}

// --- the conversation ---------------------------------------------------------------------------------------

function addUser(content) {
  const text = make("div", "text", content);
  const node = make("article", "user", text);
  node.setAttribute("aria-label", "You");
  const turn = { role: "user", content, node };
  const foot = make("footer", "", button("Edit", () => edit(turn), "Put this message back to change it"));
  node.append(foot);
  turns.push(turn);
  $("empty")?.remove();
  log.append(node);
  log.scrollTop = log.scrollHeight;
}

/** Take back a message and all after it, for another try. */
function edit(turn) {
  stop();
  forget(turn);
  input.value = turn.content;
  grow();
  input.focus();
}

function forget(turn) {
  const at = turns.indexOf(turn);
  if (at < 0) return;
  turns.splice(at);
  while (turn.node.nextSibling) turn.node.nextSibling.remove();
  turn.node.remove();
}

function send() {
  const text = input.value;
  if (running || !text.trim()) return;
  input.value = "";
  grow();
  addUser(text);
  answer();
}

/** An answer on the page while it comes. */
class Answer {
  constructor() {
    this.content = "";
    this.reasoning = "";
    this.tokens = [];
    this.chunks = 0;
    this.began = performance.now();
    this.first = this.last = null;
    this.foldedByHand = false;
    this.summary = make("summary", "", "Thinking");
    this.thoughts = make("div", "thoughts");
    this.details = make("details", "thinking", this.summary, this.thoughts);
    this.details.hidden = true;
    this.details.open = true;
    this.summary.addEventListener("click", () => (this.foldedByHand = true));
    this.text = make("div", "text markdown");
    this.wait = make("div", "wait", make("i"), make("i"), make("i"));
    this.note = make("p", "note");
    this.note.hidden = true;
    this.figures = make("span", "figures");
    this.foot = make("footer", "", this.figures);
    this.node = make("article", "assistant", this.details, this.text, this.wait, this.note, this.foot);
    this.node.setAttribute("aria-label", "Answer");
    this.node.setAttribute("aria-busy", "true");
  }

  take(choice, now) {
    const delta = choice.delta ?? {};
    const reasoning = delta.reasoning ?? delta.reasoning_content ?? "";
    const calls = (delta.tool_calls ?? []).map((call) => (call.function?.name ?? "") + (call.function?.arguments ?? ""));
    const content = (delta.content ?? "") + calls.join("");
    if (choice.logprobs?.content) this.tokens.push(...choice.logprobs.content);
    if (!reasoning && !content) return;
    this.first ??= now;
    this.last = now;
    this.chunks += 1;
    if (reasoning) this.reasoning += reasoning;
    if (content) {
      if (!this.content && this.reasoning) this.thought = now;
      this.content += content;
    }
    this.changed = true;
  }

  /** Bring the page up to date; called once a frame. */
  show(done = false) {
    if (!this.changed && !done) return;
    this.changed = false;
    following(() => {
      this.wait.hidden = done || Boolean(this.content || this.reasoning);
      if (this.reasoning) {
        const seconds = ((this.thought ?? this.last) - this.first) / 1000;
        const over = this.thought || done;
        this.details.hidden = false;
        this.summary.textContent = over ? `Thought for ${spoken(seconds)}` : `Thinking · ${spoken(seconds)}`;
        this.details.classList.toggle("live", !over);
        showMarkdown(this.thoughts, this.reasoning);
        if (over && !this.foldedByHand) {
          this.details.open = false;
          this.foldedByHand = true;
        }
      }
      showMarkdown(this.text, this.content);
      this.figures.textContent = this.told(done);
    });
  }

  told(done) {
    if (this.first === null) return done ? "" : "waiting";
    const parts = [];
    const count = this.usage?.completion_tokens ?? this.tokens.length ?? 0;
    const tokens = count || this.chunks;
    const seconds = (this.last - this.first) / 1000;
    parts.push(`${count ? "" : "about "}${tokens} token${tokens === 1 ? "" : "s"}`);
    const rate = (tokens - 1) / seconds;
    if (seconds >= 0.05 && tokens > 1) parts.push(`${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
    parts.push(`first after ${((this.first - this.began) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }

  say(text, ...actions) {
    this.note.hidden = false;
    this.note.replaceChildren(text, ...(actions.length ? [" "] : []), ...actions);
  }

  end() {
    this.show(true);
    this.node.setAttribute("aria-busy", "false");
    const actions = this.note.classList.contains("error") ? [] : [button("Again", () => again(this), "Answer once more")];
    if (this.content) actions.unshift(button("Copy", (node) => copyText(node, this.content)));
    if (this.tokens.length) actions.push(button("Tokens", (node) => this.toggleTokens(node), "Each token and its alternatives"));
    following(() => this.foot.append(make("span", "actions", ...actions)));
  }

  toggleTokens(node) {
    if (this.list) {
      this.list.remove();
      this.list = null;
    } else {
      this.list = make("div", "tokens");
      showTokens(this.list, this.tokens);
      this.foot.before(this.list);
    }
    node.setAttribute("aria-pressed", String(Boolean(this.list)));
  }
}

function spoken(seconds) {
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

function again(answerNow) {
  if (running) return;
  const turn = turns.find(({ node }) => node === answerNow.node);
  if (turn) {
    forget(turn);
  } else {
    answerNow.node.remove();
  }
  if (turns.length && turns.at(-1).role === "user") answer();
}

const REASONS = {
  length: "Ended at the most tokens allowed.",
  content_filter: "Ended by the server's content filter.",
  timeout: "Ended at the server's time limit.",
  error: "The model could not go on: its numbers were not finite.",
  cancelled: "The server ended this answer.",
};

async function answer() {
  const now = new Answer();
  const control = new AbortController();
  running = { now, control };
  setRunning(true);
  following(() => log.append(now.node));
  log.scrollTop = log.scrollHeight;
  let frame = 0;
  const draw = () => {
    frame = 0;
    now.show();
  };
  let reason = null;
  try {
    model ??= await findModel(control.signal);
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(body(history())),
      signal: control.signal,
    });
    if (!response.ok) throw await refusal(response);
    for await (const event of events(response)) {
      if (event.error) throw new Problem(event.error.message ?? "the server failed");
      if (event.usage) now.usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      now.take(choice, performance.now());
      reason = choice.finish_reason ?? reason;
      frame ||= requestAnimationFrame(draw);
    }
    if (reason === null) throw new Problem("The connection ended before the answer did.");
    if (REASONS[reason]) now.say(REASONS[reason]);
  } catch (error) {
    tell(now, error);
  }
  cancelAnimationFrame(frame);
  now.end();
  if (now.content || now.reasoning) turns.push({ role: "assistant", content: now.content, node: now.node });
  running = null;
  setRunning(false);
  $("said").textContent = now.content ? "The answer is complete." : "There is no answer.";
}

// --- what can go wrong --------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(message, { key = false, wait = null } = {}) {
    super(message);
    Object.assign(this, { key, wait });
  }
}

async function refusal(response) {
  let told = "";
  try {
    told = (await response.json()).error?.message ?? "";
  } catch {
    // not JSON: something in between answered
  }
  const { status } = response;
  if (status === 401) return new Problem("This server needs an API key.", { key: true });
  if (status === 429) {
    const wait = Math.min(600, Math.ceil(Number(response.headers.get("retry-after")) || 5));
    return new Problem("The server is busy.", { wait });
  }
  if (status === 504) return new Problem("The server's time limit passed before the answer was there.");
  if (status === 503) return new Problem("The server is not ready: it is loading or shutting down.", { wait: 5 });
  return new Problem(told ? `${told} (${status})` : `The server answered ${status}.`);
}

function tell(now, error) {
  if (error.name === "AbortError") {
    now.say("Stopped.");
    return;
  }
  now.note.classList.add("error");
  now.note.setAttribute("role", "alert");
  const retry = button("Try again", () => again(now));
  if (error instanceof Problem && error.key) {
    openPanel(true);
    $("key").focus();
    now.say(`${error.message} Give it in the settings, then`, retry);
  } else if (error instanceof Problem && error.wait) {
    countdown(now, error.message, error.wait, retry);
  } else if (error instanceof TypeError) {
    now.say("The server cannot be reached.", retry);
  } else {
    now.say(typeof error === "string" ? error : error.message, retry);
  }
}

function countdown(now, message, seconds, retry) {
  const left = make("span");
  now.say(message + " ", left, " ", retry);
  const tick = () => {
    left.textContent = seconds > 0 ? `Next try in ${seconds} s.` : "";
    if (!now.node.isConnected) return;
    if (seconds <= 0) {
      again(now);
      return;
    }
    seconds -= 1;
    setTimeout(tick, 1000);
  };
  tick();
}

function stop() {
  running?.control.abort();
}

async function findModel(signal) {
  const response = await fetch("v1/models", { headers: headers(), signal });
  if (!response.ok) throw await refusal(response);
  const names = (await response.json()).data.map(({ id }) => id);
  if (!names.length) throw new Problem("The server has no model.");
  const select = $("models");
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  $("models-row").hidden = names.length < 2;
  named(names[0]);
  return names[0];
}

function named(name) {
  $("model").textContent = $("model").title = name;
  document.title = name;
}

// --- the page -----------------------------------------------------------------------------------------------

function setRunning(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  document.body.classList.toggle("running", yes);
  grow();
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight * 0.4)}px`;
  $("send").disabled = !input.value.trim();
}

function openPanel(yes) {
  $("panel").hidden = !yes;
  $("options").setAttribute("aria-expanded", String(yes));
}

function fresh() {
  stop();
  turns = [];
  log.replaceChildren(make("div", "", make("p", "", "Ask something. The conversation stays in this tab and is gone with it.")));
  log.firstChild.id = "empty";
  showDown();
  input.focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  // While an input method composes (Chinese, Japanese), Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (!$("panel").hidden) {
    openPanel(false);
    $("options").focus();
  }
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", fresh);
$("options").addEventListener("click", () => openPanel($("panel").hidden));
$("close").addEventListener("click", () => openPanel(false));
$("models").addEventListener("change", () => named((model = $("models").value)));
$("down").addEventListener("click", () => (log.scrollTop = log.scrollHeight));
$("theme").addEventListener("click", () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const root = document.documentElement;
  root.dataset.theme = (root.dataset.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
});
log.addEventListener("scroll", showDown, { passive: true });
addEventListener("resize", showDown);

findModel().then(
  (name) => (model ??= name),
  (error) => {
    $("model").textContent = error.key ? "API key needed" : "no connection";
    if (error.key) openPanel(true);
  },
);
$("key").addEventListener("change", () => findModel().then((name) => (model ??= name), () => {}));
grow();
input.focus();
