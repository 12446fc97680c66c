// Markdown as DOM nodes. Text only ever goes through textContent, tags and attributes are fixed here, and links are
// http, https or mailto: what a model writes cannot become markup.

const MAX_DEPTH = 8; // of quotes and lists

/** Show `source` in `element`, keeping the nodes of blocks that have not changed (an answer grows at its end). */
export function showMarkdown(element, source) {
  const wanted = blocks(source.split("\n"));
  const old = element.blockKeys ?? [];
  let same = 0;
  while (same < wanted.length && same < old.length && wanted[same].key === old[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  for (const block of wanted.slice(same)) element.append(block.node());
  element.blockKeys = wanted.map((block) => block.key);
}

function make(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

// --- blocks: [{key, node()}] --------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

function blocks(lines, depth = 0) {
  const out = [];
  let at = 0;
  const add = (from, kind, node) => out.push({ key: kind + "\n" + lines.slice(from, at).join("\n"), node });
  while (at < lines.length) {
    const from = at;
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = FENCE.exec(line))) {
      const [, fence, info] = match;
      const closing = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
      at += 1;
      while (at < lines.length && !closing.test(lines[at])) at += 1;
      const code = lines.slice(from + 1, at).join("\n");
      at += 1;
      add(from, "code", () => codeBlock(code, info.trim().split(/\s/)[0]));
    } else if ((match = HEADING.exec(line))) {
      at += 1;
      const [, marks, text] = match;
      add(from, "heading", () => make(`h${Math.min(6, marks.length + 1)}`, ...inline(text)));
    } else if (RULE.test(line)) {
      at += 1;
      add(from, "rule", () => make("hr"));
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      while (at < lines.length && lines[at].trim() && (QUOTE.test(lines[at]) || !starts(lines, at))) at += 1;
      const inner = lines.slice(from, at).map((quoted) => QUOTE.exec(quoted)?.[1] ?? quoted);
      add(from, "quote", () => make("blockquote", ...blocks(inner, depth + 1).map((block) => block.node())));
    } else if (ITEM.test(line) && depth < MAX_DEPTH) {
      at = endOfList(lines, at);
      const inner = lines.slice(from, at);
      add(from, "list", () => list(inner, depth));
    } else if (line.includes("|") && at + 1 < lines.length && isTable(line, lines[at + 1])) {
      while (at < lines.length && lines[at].includes("|")) at += 1;
      const rows = lines.slice(from, at);
      add(from, "table", () => table(rows));
    } else {
      at += 1;
      while (at < lines.length && lines[at].trim() && !starts(lines, at)) at += 1;
      const text = lines.slice(from, at).join("\n").trim();
      add(from, "text", () => make("p", ...inline(text)));
    }
  }
  return out;
}

/** Whether line `at` begins a block that ends a paragraph. */
function starts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  return Boolean(item && item[3]?.trim() && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1));
}

function isTable(head, divider) {
  return DIVIDER.test(divider) && divider.includes("|") && cells(head).length === cells(divider).length;
}

function endOfList(lines, at) {
  const ordered = /\d/.test(ITEM.exec(lines[at])[2]);
  const indent = ITEM.exec(lines[at])[1].length;
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    if (!line.trim()) {
      // A blank line goes on with the list if an item or something indented follows.
      const next = lines.slice(end).findIndex((later) => later.trim());
      if (next < 0) return end;
      const follows = lines[end + next];
      const item = ITEM.exec(follows);
      const goesOn = item ? item[1].length > indent || /\d/.test(item[2]) === ordered : /^ {2,}/.test(follows);
      if (!goesOn) return end;
      end += next;
      continue;
    }
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent && /\d/.test(item[2]) !== ordered) return end;
    if (!item && !/^\s/.test(line) && starts(lines, end)) return end;
    end += 1;
  }
  return end;
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const node = make(ordered ? "ol" : "ul");
  if (ordered && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length + 1) {
      items.push({ lines: [item[3] ?? ""], indent: item[1].length + item[2].length + 1 });
    } else {
      const { lines: inner, indent } = items[items.length - 1];
      inner.push(line.slice(Math.min(indent, line.length - line.trimStart().length)));
    }
  }
  for (const { lines: inner } of items) {
    const parts = blocks(inner, depth + 1).map((block) => block.node());
    // A lone paragraph in front stands in the item itself.
    if (parts[0]?.tagName === "P") parts.splice(0, 1, ...parts[0].childNodes);
    node.append(make("li", ...parts));
  }
  return node;
}

function cells(row) {
  const text = row.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(rows) {
  const aligned = cells(rows[1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left",
  );
  const row = (tag, line) => {
    const parts = cells(line);
    return make(
      "tr",
      ...aligned.map((align, number) => {
        const cell = make(tag, ...inline(parts[number] ?? ""));
        cell.className = align;
        return cell;
      }),
    );
  };
  const body = make("tbody", ...rows.slice(2).map((line) => row("td", line)));
  const outer = make("div", make("table", make("thead", row("th", rows[0])), body));
  outer.className = "table";
  return outer;
}

function codeBlock(code, language) {
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.className = "copy";
  copy.addEventListener("click", () => copyText(copy, code));
  const bar = make("div", make("span", language || "text"), copy);
  bar.className = "bar";
  const outer = make("div", bar, make("pre", make("code", code)));
  outer.className = "code";
  return outer;
}

/** Copy `text`, and say so on the button. */
export async function copyText(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // pages over plain http, other than from this machine, may not copy
  }
  setTimeout(() => (button.textContent = label), 1500);
}

// --- inside a block -----------------------------------------------------------------------------------------

const ESCAPED = /^\\([!-/:-@[-`{-~])/;
const CODE = /^(`{1,8})(?!`)([^]*?[^`])\1(?!`)/;
const LINK = /^!?\[((?:[^[\]\\]|\\.|\[[^[\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'(][^"')]*["')])?\s*\)/;
const BARE = /^(?:https?:\/\/|mailto:)[^\s<>"'`|]*[^\s<>"'`|.,;:!?*_~)\]}）。，；：！？、]/;
const MARKED = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  const put = (...nodes) => {
    if (plain) out.push(plain);
    plain = "";
    out.push(...nodes);
  };
  let at = 0;
  while (at < text.length) {
    const rest = text.slice(at, at + 4096);
    const char = text[at];
    let match;
    if (char === "\\" && (match = ESCAPED.exec(rest))) {
      plain += match[1];
    } else if (char === "`" && (match = CODE.exec(rest))) {
      put(make("code", match[2].replace(/^ (.*[^ ].*) $/s, "$1").replaceAll("\n", " ")));
    } else if ((char === "[" || (char === "!" && text[at + 1] === "[")) && (match = LINK.exec(rest))) {
      const address = safeAddress(match[2]);
      const label = depth < MAX_DEPTH ? inline(match[1], depth + 1) : [match[1]];
      put(...(address ? [link(address, label)] : label));
    } else if ((char === "h" || char === "m") && !/\w/.test(text[at - 1] ?? "") && (match = BARE.exec(rest))) {
      const address = safeAddress(match[0]);
      put(...(address ? [link(address, [match[0]])] : [match[0]]));
    } else if (char === "\n") {
      put(make("br"));
      match = ["\n"];
    } else if ("*_~".includes(char) && depth < MAX_DEPTH && (match = marked(text, at))) {
      put(make(match.tag, ...inline(match.inner, depth + 1)));
    } else {
      plain += char;
      match = [char];
    }
    at += match[0].length;
  }
  put();
  return out;
}

function marked(text, at) {
  for (const [mark, tag] of MARKED) {
    if (!text.startsWith(mark, at) || /\s/.test(text[at + mark.length] ?? " ")) continue;
    if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) continue; // snake_case is no emphasis
    let end = at + mark.length;
    for (;;) {
      end = text.indexOf(mark, end + 1);
      if (end < 0 || end - at > 4096) break;
      if (/\s/.test(text[end - 1]) || text[end - 1] === "\\") continue;
      if (mark.length === 1 && text[end + 1] === mark) {
        end += 1; // a double mark inside
        continue;
      }
      if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[end + mark.length] ?? "")) continue;
      return { 0: text.slice(at, end + mark.length), tag, inner: text.slice(at + mark.length, end) };
    }
  }
  return null;
}

/** `address` if it is a web or mail address that a link may lead to, else null. */
function safeAddress(address) {
  try {
    const { protocol, href } = new URL(address);
    return ["http:", "https:", "mailto:"].includes(protocol) ? href : null;
  } catch {
    return null;
  }
}

function link(address, label) {
  const node = make("a", ...label);
  node.href = address;
  node.rel = "noopener noreferrer nofollow";
  node.target = "_blank";
  node.title = address;
  return node;
}
