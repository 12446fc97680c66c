"""The chat page in a real browser, against a stub of the server's routes."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.stub import STATIC, Stub, breaks_off, forever, say, with_logprobs

CHROMIUM = Path("/usr/bin/chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

MARKDOWN = """# Title

A **bold**, *slanted*, ~~struck~~ word, `code <b>`, snake_case_name and a [link](https://example.org/a?b=1).
Second line with https://example.org/x.

- one
- two
  1. inner
  2. more

> quoted

| a | b |
|---|--:|
| 1 | 2 |

```python
print("<script>alert(1)</script>")
```
"""
EVIL = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">

[a](javascript:window.hacked=1) [b](data:text/html,x) ![c](x" onerror="window.hacked=1) <javascript:window.hacked=1>

[d](https://example.org/"onmouseover="window.hacked=1) **<svg/onload=window.hacked=1>**

```"><img src=x onerror=window.hacked=1>
<img src=x onerror=window.hacked=1>
```
| <img src=x onerror=window.hacked=1> | b |
|---|---|
| `<iframe>` | x |
"""
ANSWERS: dict[str, Any] = {
    "hello": say("Hello", ", ", "你好。", reasoning=("Let me ", "think."), pause=0.02),
    "markdown": say(*re.findall(r"[\s\S]{1,7}", MARKDOWN)),
    "evil": say(EVIL, reasoning=(EVIL,)),
    "forever": forever,
    "half": breaks_off,
    "late": say("so far", reason="timeout"),
    "short": say("cut", reason="length"),
    "filtered": say("a", reason="content_filter"),
    "tokens": with_logprobs,
    "empty": say(),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub(ANSWERS) as server:
        yield server


@pytest.fixture
def page(browser: Any, stub: Stub) -> Iterator[Any]:
    """The page, ready. Nothing may be fetched from elsewhere, refused by the policy or thrown."""
    context = browser.new_context(viewport={"width": 1100, "height": 760}, reduced_motion="reduce")
    found: list[str] = []
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    opened.on("pageerror", lambda error: found.append(str(error)))
    opened.on("console", lambda m: found.append(m.text) if "Content Security Policy" in m.text else None)
    opened.on("request", lambda r: None if r.url.startswith((stub.url, "data:")) else found.append(r.url))
    opened.goto(stub.url)
    yield opened
    context.close()
    assert found == []


def ask(page: Any, text: str) -> Any:
    """Ask, wait for the end of the answer, give its element."""
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")
    last = page.locator("article.assistant").last
    expect(last).to_have_attribute("aria-busy", "false")
    return last


def shoot(page: Any, name: str) -> None:
    """Save a picture where PAGE_SHOTS says, to be looked at."""
    if folder := os.environ.get("PAGE_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def test_an_answer_streams_and_its_thinking_is_folded(page: Any, stub: Stub) -> None:
    expect(page.locator("#model")).to_have_text("tiny-deepseek")
    answer = ask(page, "hello")
    expect(answer.locator(".text")).to_have_text("Hello, 你好。")
    details = answer.locator("details")
    expect(details).to_have_js_property("open", False)
    expect(details.locator("summary")).to_have_text(re.compile(r"Thought for \d+\.\d s"))
    details.locator("summary").click()
    expect(details.locator(".thoughts")).to_have_text("Let me think.")
    expect(answer.locator(".figures")).to_have_text(
        re.compile(r"^5 tokens · [\d.]+ tokens/s · first after [\d.]+ s$")
    )
    shoot(page, "answer")
    ask(page, "hello")
    assert stub.requests[1]["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello, 你好。"},
        {"role": "user", "content": "hello"},
    ]
    assert stub.requests[0] == {
        "model": "tiny-deepseek",
        "messages": [{"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_markdown_is_shown(page: Any) -> None:
    text = ask(page, "markdown").locator(".text")
    expect(text.locator("h2")).to_have_text("Title")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("em")).to_have_text("slanted")
    expect(text.locator("del")).to_have_text("struck")
    expect(text.locator("p code")).to_have_text("code <b>")
    expect(text.locator("p").first).to_contain_text("snake_case_name")
    links = text.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/a?b=1",
        "https://example.org/x",
    ]
    assert all(link.get_attribute("rel") == "noopener noreferrer nofollow" for link in links.all())
    expect(text.locator("ul > li")).to_have_count(2)
    expect(text.locator("ul ol > li")).to_have_text(["inner", "more"])
    expect(text.locator("blockquote")).to_have_text("quoted")
    expect(text.locator("td")).to_have_text(["1", "2"])
    expect(text.locator("td").nth(1)).to_have_class("right")
    expect(text.locator("pre code")).to_have_text('print("<script>alert(1)</script>")')
    expect(text.locator(".code .bar span")).to_have_text("python")
    shoot(page, "markdown")


def test_what_a_model_writes_cannot_become_markup(page: Any) -> None:
    answer = ask(page, "evil")
    answer.locator("summary").click()
    assert page.evaluate("window.hacked") is None
    for place in (".text", ".thoughts"):
        inside = answer.locator(place)
        assert inside.locator("script, img, svg, iframe, [onerror], [onload], [onmouseover]").count() == 0
        hrefs = [link.get_attribute("href") for link in inside.locator("a").all()]
        assert all(href.startswith("https://example.org/") for href in hrefs), hrefs
        expect(inside).to_contain_text("<script>window.hacked = 1</script>")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", _scripts())


def _scripts() -> str:
    return "".join(path.read_text("utf-8") for path in STATIC.glob("*.js"))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    files = "".join(path.read_text("utf-8") for path in STATIC.iterdir())
    assert re.findall(r"""(?:src|href|url|import|from)\s*[=(]?\s*["'(](?:https?:)?//""", files) == []
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", files)
    html = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\sstyle=|\son\w+=", html)


@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_can_be_stopped(page: Any, stub: Stub, way: str) -> None:
    page.locator("#input").fill("forever")
    page.locator("#send").click()
    expect(page.locator("article.assistant .text")).to_contain_text("word2")
    expect(page.locator("#send")).to_be_hidden()
    shoot(page, "running")
    if way == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    answer = page.locator("article.assistant")
    expect(answer.locator(".note")).to_have_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    assert stub.left.wait(5), "the server was not told"
    ask(page, "hello")
    assert stub.requests[1]["messages"][1]["content"].startswith("word0 word1 ")


@pytest.mark.parametrize(
    ("question", "note"),
    [
        ("late", "Ended at the server's time limit."),
        ("short", "Ended at the most tokens allowed."),
        ("filtered", "Ended by the server's content filter."),
    ],
)
def test_reasons_to_end_are_told(page: Any, question: str, note: str) -> None:
    expect(ask(page, question).locator(".note")).to_have_text(note)


def test_a_missing_key_is_asked_for_and_then_used(browser: Any, stub: Stub) -> None:
    stub.key = "sesame"
    page = browser.new_page()
    page.goto(stub.url)
    expect(page.locator("#model")).to_have_text("API key needed")
    answer = ask(page, "hello")
    expect(answer.locator(".note")).to_contain_text("This server needs an API key.")
    expect(page.locator("#key")).to_be_focused()
    shoot(page, "key")
    page.locator("#key").fill("sesame")
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .text")).to_have_text("Hello, 你好。")
    assert page.locator("article.assistant").count() == 1 and len(stub.requests) == 1
    page.close()


def test_a_busy_server_is_tried_again_after_its_time(page: Any, stub: Stub) -> None:
    stub.refusals = [(429, {"retry-after": "1"})]
    page.locator("#input").fill("hello")
    page.locator("#input").press("Enter")
    expect(page.locator(".note")).to_contain_text("The server is busy. Next try in 1 s.")
    expect(page.locator("article.assistant .text")).to_have_text("Hello, 你好。")
    assert len(stub.requests) == 2 and page.locator(".error").count() == 0


@pytest.mark.parametrize(
    ("status", "note"), [(504, "time limit passed"), (400, "told so (400)"), (500, "told so (500)")]
)
def test_errors_are_shown_and_can_be_tried_again(page: Any, stub: Stub, status: int, note: str) -> None:
    stub.refusals = [(status, {})]
    answer = ask(page, "hello")
    expect(answer.locator(".note.error")).to_contain_text(note)
    shoot(page, f"error-{status}")
    answer.get_by_role("button", name="Try again").click()
    expect(page.locator("article.assistant .text")).to_have_text("Hello, 你好。")


def test_a_connection_that_ends_early_is_told(page: Any, stub: Stub) -> None:
    answer = ask(page, "half")
    expect(answer.locator(".text")).to_have_text("half of it")
    expect(answer.locator(".note")).to_contain_text("The connection ended before the answer did.")


def test_settings_are_sent(page: Any, stub: Stub) -> None:
    page.locator("#options").click()
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.7",
        "top_p": "0.9",
        "top_k": "40",
        "min_p": "0.05",
        "max_tokens": "64",
        "seed": "7",
        "presence_penalty": "0.5",
        "frequency_penalty": "-0.5",
        "stops": "END\n##",
    }.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#thinking").select_option("off")
    shoot(page, "settings")
    ask(page, "hello")
    sent = stub.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7}
    wanted = {
        **numbers,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "stop": ["END", "##"],
        "thinking": False,
    }
    assert {key: sent[key] for key in wanted} == wanted
    page.locator("#top_p").fill("3")
    expect(ask(page, "hello").locator(".note")).to_contain_text("Top-p:")
    assert len(stub.requests) == 1


def test_tokens_and_their_alternatives(page: Any, stub: Stub) -> None:
    page.locator("#options").click()
    page.locator("#alternatives").check()
    answer = ask(page, "tokens")
    assert (stub.requests[0]["logprobs"], stub.requests[0]["top_logprobs"]) == (True, 5)
    answer.get_by_role("button", name="Tokens").click()
    expect(answer.locator(".token")).to_have_text(["Hi", "·", "中"])
    answer.locator(".token").first.hover()
    expect(answer.locator(".card td")).to_have_text(["Hi", "90.5 %", "", "Yo", "8.2 %", ""])
    shoot(page, "tokens")


def test_keys_and_input_methods(page: Any, stub: Stub) -> None:
    field = page.locator("#input")
    field.fill("a")
    field.press("Shift+Enter")
    field.press("b")
    expect(field).to_have_value("a\nb")
    field.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "isComposing": True})
    assert stub.requests == []
    field.fill("   ")
    expect(page.locator("#send")).to_be_disabled()
    field.press("Enter")
    assert stub.requests == []


def test_a_message_can_be_changed_and_an_answer_asked_again(page: Any, stub: Stub) -> None:
    ask(page, "hello")
    ask(page, "short")
    page.locator("article.user").nth(1).get_by_role("button", name="Edit").click()
    expect(page.locator("#input")).to_have_value("short")
    expect(page.locator("article")).to_have_count(2)
    page.locator("article.assistant").get_by_role("button", name="Again").click()
    expect(page.locator("article.assistant .text")).to_have_text("Hello, 你好。")
    assert [len(request["messages"]) for request in stub.requests] == [1, 3, 1]
    page.locator("#new").click()
    expect(page.locator("article")).to_have_count(0)


def test_a_narrow_screen_in_the_dark(browser: Any, stub: Stub) -> None:
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, color_scheme="dark", has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(stub.url)
    ask(page, "markdown")
    ask(page, "hello")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 28)"
    shoot(page, "narrow-dark")
    page.locator("#options").click()
    shoot(page, "narrow-settings")
    page.locator("#close").click()
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    context.close()


_RENDER = """async (texts) => {
  const { showMarkdown } = await import("/static/markdown.js");
  const allowed = new Set(["P","H2","H3","H4","H5","H6","HR","BR","UL","OL","LI","BLOCKQUOTE","STRONG","EM","DEL",
    "CODE","PRE","DIV","SPAN","BUTTON","A","TABLE","THEAD","TBODY","TR","TH","TD"]);
  const found = [];
  let slowest = 0;
  for (const text of texts) {
    const whole = document.createElement("div");
    const began = performance.now();
    showMarkdown(whole, text);
    slowest = Math.max(slowest, performance.now() - began);
    for (const node of whole.querySelectorAll("*")) {
      const known = ["class","href","rel","target","title","type","start"];
      const names = node.getAttributeNames().filter((name) => !known.includes(name));
      if (!allowed.has(node.tagName) || names.length) found.push([text, node.tagName, ...names]);
      if (node.href && !/^(https?|mailto):/.test(node.href)) found.push([text, node.href]);
    }
    if (text.length > 2000) continue;
    const grown = document.createElement("div");
    for (let end = 0; end <= text.length; end += 3) showMarkdown(grown, text.slice(0, end));
    showMarkdown(grown, text);
    if (grown.innerHTML !== whole.innerHTML) found.push([text, "differs when it grows"]);
  }
  return { found, slowest };
}"""


MARKUP = [
    "**",
    "```",
    "~~~",
    "\n- ",
    "\n1. ",
    "\n> ",
    "|---|",
    "http://a.b/",
    "](javascript:x)",
    "<img src=x onerror=a>",
]
MARKUP += [
    "\n    ",
    "中",
    "mailto:a@b",
    "](https://a.b)",
    "\n| a | b |\n|--|--|\n",
    "***",
    "&lt;",
    "\t",
    "\u2028",
]


def test_any_markdown_gives_known_elements_and_the_same_when_it_grows(page: Any) -> None:
    rng = random.Random(0)
    parts = [*"*_~`[]()<>!|#-+ \n\n\\a1.:", *MARKUP]
    texts = ["".join(rng.choices(parts, k=rng.randint(1, 40))) for _ in range(400)]
    assert page.evaluate(_RENDER, texts)["found"] == []


def test_no_markdown_is_slow(page: Any) -> None:
    units = [
        "*",
        "**a ",
        "_a",
        "`",
        "`a",
        "[",
        "[a](",
        "![",
        "> ",
        "- ",
        "\n- a",
        "\n> > ",
        "|a",
        "<",
        "http://",
        "\\",
        "~~",
        "- - ",
    ]
    result = page.evaluate(
        _RENDER, [unit * (20_000 // len(unit)) for unit in units] + [" " * n + "- a\n" for n in range(50)]
    )
    assert result["found"] == [] and result["slowest"] < 5000, result["slowest"]


def test_the_page_on_the_real_server(browser: Any) -> None:
    pytest.importorskip("fastapi", reason="the `serve` extra is not installed")
    from tests.serving import fake

    with fake.running("delay", "0.01", "request_timeout", "3.0") as server:
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(server.url + "/")
        expect(page.locator("#model")).to_have_text(fake.MODEL)
        answer = ask(page, "abc")
        expect(answer.locator(".text p")).to_have_text([":tnatsissA", "cba :resU"])
        expect(answer.locator(".figures")).to_have_text(
            re.compile(r"^21 tokens · [\d.]+ tokens/s · first after")
        )
        page.locator("#options").click()
        page.locator("#alternatives").check()
        page.locator("#max_tokens").fill("3")
        answer = ask(page, "abc")
        expect(answer.locator(".note")).to_have_text("Ended at the most tokens allowed.")
        answer.get_by_role("button", name="Tokens").click()
        expect(answer.locator(".token")).to_have_text([":", "t", "n"])
        page.locator("#max_tokens").fill("9999")
        expect(ask(page, "abc").locator(".note.error")).to_contain_text("context")
        page.locator("#max_tokens").fill("480")
        expect(ask(page, "x" * 400).locator(".note")).to_have_text("Ended at the server's time limit.")
        page.close()
        assert errors == []
