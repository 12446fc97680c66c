"""Content rules: what is found is what the definition says, nothing of it leaves, and little is held back."""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from dsv3_jax.errors import ConfigError
from dsv3_jax.serving.automaton import Match
from dsv3_jax.serving.deltas import ToolDelta
from dsv3_jax.serving.filter import Filter, FilterStream, Verdict, filter_messages, load_filter
from dsv3_jax.serving.folding import continues, fold, in_word
from dsv3_jax.serving.marks import MARKS
from dsv3_jax.serving.parse import AnswerParser
from dsv3_jax.serving.patterns import lengths, parse
from dsv3_jax.serving.rules import Rule, RuleFile, RuleFilter
from dsv3_jax.serving.text import TextStream
from dsv3_jax.text import Tokenizer

BYTES = Tokenizer.bytes()


def _filter(*rules: Rule, mask: str = "#") -> RuleFilter:
    return RuleFilter(RuleFile(rules, mask))


def _redact(name: str = "r", **values: Any) -> Rule:
    return Rule(name, action="redact", **values)


# --- the definition, by brute force ------------------------------------------------------------------------------


def _found(text: str, rules: list[Rule]) -> list[tuple[int, Match]]:
    """(folded position where it is certain, match) of every substring that a rule matches, slowly."""
    folded = [(char, at) for at, source in enumerate(text) for char in fold(source)]
    chars = [char for char, _ in folded]
    out = []
    for number, rule in enumerate(rules):
        for source in [*rule.regex, *rule.words]:
            word_start, word_end = source.startswith(r"\b"), source.endswith(r"\b")
            if source in rule.words:
                word_start = rule.whole_word and in_word(fold(source[0])[0])
                word_end = rule.whole_word and in_word(fold(source[-1])[-1])
                body = r"\s{1,8}".join(re.escape("".join(map(fold, word))) for word in source.split())
            else:
                body = "".join(map(fold, source.replace(r"\b", "")))
            for start in range(len(chars)):
                for end in range(start + 1, len(chars) + 1):
                    if not re.fullmatch(body, "".join(chars[start:end])):
                        continue
                    after, before = (
                        (chars[end] if end < len(chars) else ""),
                        (chars[start - 1] if start else ""),
                    )
                    if (before and continues(chars[start])) or (after and continues(after)):
                        continue
                    if word_start and before and in_word(before) and in_word(chars[start]):
                        continue
                    if word_end and after and in_word(after) and in_word(chars[end - 1]):
                        continue
                    out.append((end, Match(folded[start][1], folded[end - 1][1] + 1, number)))
    return out


def _by_definition(text: str, rules: list[Rule], mask: str = "#") -> Verdict:
    found = _found(text, rules)
    blocks = [(end, match.start) for end, match in found if rules[match.rule].action == "block"]
    stop, limit = len(text), None
    if blocks:
        limit, stop = min(blocks)
    spans: list[list[int]] = []
    hide = [m for end, m in found if rules[m.rule].action == "redact" and (limit is None or end < limit)]
    for match in sorted(hide, key=lambda m: (m.start, m.end)):
        if spans and match.start < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], match.end)
        else:
            spans.append([match.start, match.end])
    out, at = "", 0
    for start, end in spans:
        if start < stop:
            out, at = out + text[at:start] + mask, end
    return Verdict(out + text[at:stop], bool(blocks))


_RULES = st.sampled_from(
    [
        _redact(words=("ab",)),
        _redact(words=("ab",), whole_word=False),
        _redact(words=("a b", "ba")),
        _redact(words=("é", "中a")),
        _redact(words=("e",), whole_word=False),
        _redact(regex=("a{2,4}",)),
        _redact(regex=("(ab|b)?a",)),
        _redact(regex=(r"\bb[ab]{0,3}\b",)),
        _redact(regex=("[^a ]b|中",)),
        Rule("b", words=("aba",), whole_word=False),
        Rule("b", regex=("b{3}",)),
        Rule("b", words=("b",)),
        Rule("b", regex=(r"a.{1,2}b",)),
    ]
)
_TEXT = st.text(st.sampled_from("aabbAＢé中 \u200b-e\u0301ﬁ"), max_size=12)


def _streamed(content_filter: Filter, pieces: list[str], where: str = "content") -> tuple[Verdict, str]:
    """(the verdict on the whole, what had left before the end was known)."""
    stream = content_filter.stream(where=where)
    shown = ""
    for piece in pieces:
        verdict = stream.push(piece)
        shown += verdict.text
        if verdict.blocked:
            assert stream.push("more") == stream.finish() == Verdict("", True)
            return Verdict(shown, True), shown
    last = stream.finish()
    return Verdict(shown + last.text, last.blocked), shown


def _named(rules: list[Rule]) -> list[Rule]:
    return [Rule(**{**rule.__dict__, "name": f"{rule.name}{number}"}) for number, rule in enumerate(rules)]


@given(_TEXT, st.lists(_RULES, min_size=1, max_size=3), st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=800, deadline=None)
def test_any_cut_gives_what_the_definition_gives(text: str, rules: list[Rule], cuts: list[int]) -> None:
    rules = _named(rules)
    content_filter, wanted = _filter(*rules), _by_definition(text, rules)
    assert content_filter.check(text) == wanted
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert _streamed(content_filter, [text[a:b] for a, b in itertools.pairwise(edges)])[0] == wanted
    assert _streamed(content_filter, list(text))[0] == wanted


@given(_TEXT)
@settings(max_examples=300, deadline=None)
def test_only_what_may_become_a_match_is_held_back(text: str) -> None:
    """Held back is nothing, or a beginning of the phrase, or the whole of it until its word is seen to end."""
    stream = _filter(_redact(words=("ab b",)), mask="").stream()
    shown = stream.push(text).text
    held = text[len(shown) :] if text.startswith(shown) else ""
    assert re.fullmatch(r"(a|ab|ab\s{1,8}|ab\s{1,8}b)?", "".join(map(fold, held)))


def test_a_phrase_across_deltas_never_leaves_in_part() -> None:
    content_filter = _filter(_redact(words=("Blue Heron",)))
    for pieces in (["the Blue", " Heron flies"], list("the Blue Heron flies"), ["the blue  ", "HERON flies"]):
        verdict, _ = _streamed(content_filter, pieces)
        assert verdict == Verdict("the # flies")
    stream = content_filter.stream()
    assert [stream.push(piece).text for piece in ("the ", "Blue", " ", "Her", "ring")] == [
        "the ",
        "",
        "",
        "",
        "Blue Herring",
    ]


def test_blocking_ends_the_text_before_the_phrase() -> None:
    stream = _filter(Rule("no", words=("secret",))).stream()
    assert stream.push("a sec") == Verdict("a ")
    assert stream.push("ret") == Verdict("")  # "secrets" is another word
    assert stream.push(" b") == Verdict("", True)


@pytest.mark.parametrize(
    ("word", "text", "hit"),
    [
        ("foo", "FOO", True),
        ("foo", "Ｆｏｏ", True),
        ("foo", "f\u200bo\u00ado", True),
        ("foo", "food", False),
        ("foo", "foo_", False),
        ("foo", "说foo吧", True),
        ("straße", "STRASSE", True),
        ("file", "ﬁle", True),
        ("café", "cafe\u0301", True),
        ("cafe", "café", False),
        ("蓝鹭", "有蓝鹭飞", True),
        ("가", "각", False),
        ("가", "가다", True),
        ("١٢", "1٢", False),
        ("c++", "use c++!", True),
    ],
)
def test_words_as_people_spell_them(word: str, text: str, hit: bool) -> None:
    assert _filter(Rule("w", words=(word,))).check(text).blocked == hit


@pytest.mark.parametrize(
    "source",
    [
        "a*",
        "a+",
        "a{2,}",
        "a{,3}",
        "^a",
        "a$",
        r"(a)\1",
        "(?=a)b",
        "(?P<x>a)",
        "(?i)a",
        "a{300}",
        "(a{200}){200}",
        "a?",
        "",
    ]
    + [
        "(",
        "a)",
        "[a",
        "a{x}",
        r"\q",
        "[z-a]",
        r"a\bb",
        "(" * 40 + "a" + ")" * 40,
        "[^é]",
        "\\",
        "(((a{99}){99}){99}){99}",
    ],
)
def test_patterns_without_a_bound_and_unknown_syntax_are_refused(source: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=r"^rule 'x': regex "):
        _filter(Rule("x", regex=(source,)))
    assert time.perf_counter() - began < 1


@given(st.text(st.sampled_from("ab|()[]?{1,2}.\\d-^é"), max_size=10))
@example("[1-[]")
@settings(max_examples=400, deadline=None)
def test_any_pattern_is_refused_or_finds_what_python_finds(source: str) -> None:
    try:
        pattern = parse(source, "p")
    except ConfigError:
        return
    if pattern.word_start or pattern.word_end or "é" in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of "[[", which may come to mean something else
        compiled = re.compile(source, re.IGNORECASE)  # [1-[] has A to Z between
    content_filter = _filter(_redact(regex=(source,)))
    for text in ("", "a", "b", "ab", "ba", "aab", "abab", "1", "a1b2", "-|"):
        assert (content_filter.check(text).text != text) == bool(compiled.search(text)), (source, text)
    assert lengths(pattern.node)[1] <= 256


def test_a_pattern_that_python_backtracks_on_takes_linear_time() -> None:
    content_filter = _filter(_redact(regex=("(a{1,9}){1,9}b",), name="x"))
    took = []
    for size in (2000, 8000):
        began = time.process_time()
        assert content_filter.check("a" * size).text == "a" * size
        took.append(time.process_time() - began)
    assert took[1] < 12 * took[0] + 0.05


def test_many_matches_in_a_long_text_take_linear_time() -> None:
    began = time.process_time()
    assert _filter(_redact(words=("foo",))).check("foo " * 20_000).text == "# " * 20_000
    assert time.process_time() - began < 5


# --- the file ---------------------------------------------------------------------------------------------------

EXAMPLE = """
mask: "[removed]"
rules:
  - name: project-names
    language: en
    words: [Blue Heron, 蓝鹭]
    words_file: names.txt
    action: redact
  - name: card-numbers
    regex: ['\\b\\d{4}[ -]?\\d{4}[ -]?\\d{4}[ -]?\\d{4}\\b']
    action: redact
    apply: [output]
  - name: forbidden
    words: [绝密]
"""


def test_the_file_is_read_and_its_words_apply(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(EXAMPLE, "utf-8")
    (tmp_path / "names.txt").write_text("# names\nGrey Owl\n\n", "utf-8")
    content_filter = load_filter(str(tmp_path / "rules.yaml"))
    text = "blue heron, 蓝鹭 and GREY OWL pay with 4111 1111-11111111."
    assert (
        content_filter.check(text).text == "[removed], [removed] and [removed] pay with 4111 1111-11111111."
    )
    assert (
        _streamed(content_filter, list(text))[0].text
        == "[removed], [removed] and [removed] pay with [removed]."
    )
    assert content_filter.check("a 绝密 b") == Verdict("a ", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{name: a}]", "rule 'a': has neither words nor regex"),
        ("rules: [{name: a, words: [x]}, {name: a, words: [y]}]", "a name is given twice"),
        ("rules: [{name: a, word: [x]}]", "unknown key 'rules.word'; did you mean 'words'"),
        (
            "rules: [{name: a, words: [x], action: delete}]",
            "rules.action is 'delete'; expected one of 'block', 'redact'",
        ),
        ("rules: [{name: a, words: ['\u200b']}]", "rule 'a': word .* holds no visible character"),
        ("rules: [{name: a, words: [x], apply: []}]", "rule 'a': apply is empty"),
        ("rules: [{name: a, words_file: none.txt}]", "rule 'a': words_file .*none.txt"),
        ("rules: [{name: a, regex: ['a*']}]", r"rule 'a': regex 'a\*': \* has no longest match"),
        ("{}", "lacks the key 'rules'"),
        ("[", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rules.yaml").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_filter(str(tmp_path / "rules.yaml"))
    assert "rules.yaml" in str(caught.value)


class Shout:
    """A filter of somebody else's."""

    def check(self, text: str, *, where: str = "input", request_id: str = "") -> Verdict:
        return Verdict(text.upper(), "stop" in text)

    def stream(self, *, where: str = "content", request_id: str = "") -> FilterStream:
        class Stream:
            def push(self, delta: str) -> Verdict:
                return Verdict(delta.upper())

            def finish(self) -> Verdict:
                return Verdict(f"<{where}>")

        return Stream()


def test_a_filter_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_filters.py").write_text(
        "from dsv3_jax.serving.rules import Rule, RuleFile, RuleFilter\n"
        "def make(): return RuleFilter(RuleFile((Rule('a', words=('x',)),)))\n"
        "ready = make()\nwrong = 3\ndef worse(): return 'no'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("make", "ready"):
        assert load_filter(f"my_filters:{name}").check("x").blocked
    for name, message in [
        ("my_filters:none", "my_filters has no 'none'"),
        ("my_filters_2:x", "No module named"),
        ("my_filters", "expected a .yaml file of rules, or module:attribute"),
        ("my_filters:worse", "gives str, which lacks check"),
        ("my_filters:wrong", "gives int, which lacks check"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_filter(name)


# --- in an answer -----------------------------------------------------------------------------------------------


def _ids(text: str) -> list[int]:
    return list(text.encode())


def test_each_kind_of_text_is_filtered_by_itself_and_in_order() -> None:
    stream = TextStream(BYTES, parser=AnswerParser(new_id=lambda n: f"c{n}"), content_filter=Shout())
    calls = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>' * 2
    for byte in _ids(f"<think>hm</think>yes{calls}"):
        stream.push([byte])
    stream.finish()
    answer = stream.answer
    assert (answer.reasoning, answer.content) == ("HM<reasoning>", "YES<content>")
    assert answer.tool_calls == [ToolDelta(n, f"c{n}", "f", '{"A": 1}<tool_call>') for n in (0, 1)]


def test_a_block_ends_the_answer_with_content_filter() -> None:
    stream = TextStream(BYTES, content_filter=_filter(Rule("no", words=("secret",))), stop=["END"])
    shown = "".join(d.content for byte in _ids("my secret. More END") for d in stream.push([byte]))
    assert (shown, stream.finish_reason, stream.finish()) == ("my ", "content_filter", [])
    assert stream.final_reason("stop") == "content_filter"
    late = TextStream(BYTES, content_filter=_filter(Rule("no", words=("secret",))))
    late.push(_ids("my secret"))
    assert late.finish_reason is None
    late.finish()
    assert (late.answer.content, late.finish_reason) == ("my ", "content_filter")


def test_a_block_in_the_reasoning_lets_no_content_follow() -> None:
    stream = TextStream(BYTES, parser=AnswerParser(), content_filter=_filter(Rule("no", words=("secret",))))
    stream.push(_ids("<think>a secret</think>yes"))
    stream.finish()
    assert (stream.answer.reasoning, stream.answer.content) == ("a ", "")
    assert stream.finish_reason == "content_filter"


@given(
    st.lists(
        st.sampled_from(["secret", "sec", "ret", " ", "\n", "x", "<think>", "</think>", "é"]), max_size=10
    )
)
@settings(max_examples=200, deadline=None)
def test_a_filtered_answer_is_the_same_however_it_is_cut(parts: list[str]) -> None:
    content_filter = _filter(_redact(words=("secret",)), Rule("no", words=("ret sec",)))
    answers = []
    for cut in (True, False):
        stream = TextStream(BYTES, parser=AnswerParser(tools=False), content_filter=content_filter)
        ids = _ids("".join(parts))
        for chunk in [[index] for index in ids] if cut else [ids]:
            stream.push(chunk)
        stream.finish()
        answers.append((stream.answer, stream.finish_reason))
        assert not re.search(r"(?<!\w)secret(?!\w)", stream.answer.content + "\n" + stream.answer.reasoning)
    assert answers[0] == answers[1]


def test_decisions_are_logged_without_the_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dsv3_jax.serving.filter")
    content_filter = _filter(
        _redact("names", words=("heron",)),
        _redact("birds", words=("blue heron",)),
        Rule("no", words=("zzz",)),
    )
    content_filter.check("a blue heron, zzz!", where="input", request_id="req-1")
    entries = [json.loads(record.getMessage()) for record in caplog.records]
    same = {"event": "content_filter", "request_id": "req-1", "where": "input"}
    assert sorted(entries, key=lambda e: e["offset"]) == [
        {**same, "action": "redact", "rules": ["names", "birds"], "offset": 2, "length": 10},
        {**same, "action": "block", "rules": ["no"], "offset": 14, "length": 3},
    ]
    assert "heron" not in caplog.text
    caplog.clear()
    content_filter.check("heron " * 100 + "zzz")
    actions = [json.loads(record.getMessage())["action"] for record in caplog.records]
    assert actions == ["redact"] * 8 + ["block"]


def test_all_texts_of_messages_pass_the_input_stage() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "foo"}'}}
    messages = [
        {"role": "system", "content": "foo"},
        {"role": "user", "content": [{"type": "text", "text": "a foo"}, {"type": "image_url"}]},
        {"role": "assistant", "content": None, "reasoning": "foo", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "foo"},
    ]
    tools = [
        {"type": "function", "function": {"name": "f", "description": "foo", "parameters": {"enum": ["foo"]}}}
    ]
    seen, seen_tools, blocked = filter_messages(_filter(_redact(words=("foo",))), messages, tools)
    assert not blocked and "foo" not in json.dumps([seen, seen_tools])
    assert json.dumps(seen).count("#") == 5 and json.dumps(messages).count("foo") == 5
    assert json.dumps(seen_tools).count("#") == 2
    assert filter_messages(_filter(Rule("no", words=("foo",))), messages)[2]
    assert filter_messages(_filter(Rule("no", words=("foo",))), [], tools)[2]
    assert filter_messages(_filter(_redact(words=("foo",))), ["x", None, {"role": 1}], None) == (
        ["x", None, {"role": 1}],
        None,
        False,
    )


def test_marks_never_reach_a_filter() -> None:
    seen: list[str] = []

    class Spy(Shout):
        def stream(self, *, where: str = "content", request_id: str = "") -> FilterStream:
            class Stream:
                def push(self, delta: str) -> Verdict:
                    seen.append(delta)
                    return Verdict(delta)

                def finish(self) -> Verdict:
                    return Verdict("")

            return Stream()

    stream = TextStream(BYTES, parser=AnswerParser(), content_filter=Spy())
    stream.push(_ids("<think>a</think>b<think>c<｜tool▁sep｜>｜DSML｜"))
    stream.finish()
    assert "".join(seen) == "ab<think>c<｜tool▁sep｜>｜DSML｜"
    assert not set("".join(seen)) & set(MARKS.values())
