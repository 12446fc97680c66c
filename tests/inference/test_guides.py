"""Structured output with the real tokenizer and the byte tokenizer: whatever is sampled under the masks validates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference.adjustments import Adjustments, adjust, make_adjustments, mask_words
from dsv3_jax.inference.guides import MAX_CHOICES, MAX_REGEX, MAX_SCHEMA_BYTES, Guide, Guides
from dsv3_jax.inference.options import Sampling
from dsv3_jax.inference.sampling import RowOptions, ending_ids, row_options, sample
from dsv3_jax.text import Tokenizer

pytest.importorskip("llguidance", reason="structured output needs the `serve` extra")


@jax.jit
def _sample(logits: Any, options: RowOptions, changes: Adjustments, count: Any, step: Any, eos: Any) -> Any:
    positions = step[None] + 1
    adjusted = adjust(logits, changes, count, positions, ending_ids(options, eos))
    return sample(adjusted, options, positions, logits.shape[1])[0]


class Kind:
    """A tokenizer with its guides and the vocabulary of a model that has more ids than it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, tokenizer.eos_ids
        self.guides = Guides(tokenizer, vocab, self.eos)
        pieces = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        # Random ids of a large vocabulary rarely close a string: what ends things is made likelier.
        self.bonus = np.zeros(vocab, np.float32)
        for index, piece in enumerate(pieces):
            ends = piece is not None and any(byte in b'"}],:0123456789' for byte in piece)
            self.bonus[index] = 5.0 * ends + (4.0 if piece is not None and len(piece) == 1 else 0.0)
        self.forbidden = sorted(set(tokenizer.control.values()) - set(self.eos))


@pytest.fixture(scope="module", params=["deepseek", "bytes"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "bytes":
        return Kind(Tokenizer.bytes(), 270)
    try:
        return Kind(Tokenizer.deepseek(), 129280)
    except ConfigError as error:
        pytest.skip(str(error))


def bits(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.astype("<u4").view(np.uint8), bitorder="little").astype(bool)


def walk(kind: Kind, guide: Guide, text: str) -> Guide:
    """Follow a text; each of its ids must be allowed."""
    for index in kind.tokenizer.encode_text(text):
        assert bits(guide.mask())[index], (text, index)
        guide.accept(index)
    return guide


def sampled(kind: Kind, guide: Guide, seed: int, most: int = 400) -> str:
    """The text of ids drawn on the device under the guide's masks, until it ends itself."""
    sampling = Sampling(temperature=1.0, max_new_tokens=most)
    options = row_options([sampling], [np.array([seed, 3], np.uint32)])
    rng = np.random.default_rng(seed)
    count = jnp.zeros((1, kind.vocab), jnp.int32)
    ids: list[int] = []
    for step in range(most):
        mask = guide.mask()
        assert mask.dtype == np.uint32 and mask.shape == (mask_words(kind.vocab),)
        allowed = bits(mask)
        assert not allowed[kind.forbidden].any(), "a control token is allowed"
        assert not allowed[kind.tokenizer.vocab_size :].any(), "an id beyond the tokenizer is allowed"
        assert allowed[list(kind.eos)].any() == guide.complete
        changes = make_adjustments([(sampling, np.array([5]))], kind.vocab, [mask])
        logits = (rng.normal(size=kind.vocab) + kind.bonus).astype(np.float32)
        eos = np.asarray(kind.eos, np.int32)
        token = int(_sample(logits[None], options, changes, count, step, eos))
        guide.accept(token)
        if token in kind.eos:
            return kind.tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError(f"not ended after {most} ids: {kind.tokenizer.decode(ids)[:200]!r}")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", '"'] }, "maxItems": 3},
        "size": {"anyOf": [{"type": "null"}, {"type": "number", "minimum": -1, "maximum": 1}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip


def is_person(value: Any) -> bool:
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert set(value.get("tags", [])) <= {"red", "grün", '"'} and len(value.get("tags", [])) <= 3
    assert value.get("size") is None or -1 <= value["size"] <= 1
    return set(value) <= {"name", "age", "tags", "size"}


def is_small_list(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 4 and all(isinstance(x, bool) for x in value)


CASES: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (PERSON, is_person),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}, is_small_list),
    ({"const": {"a": [1, "é", None]}}, lambda value: value == {"a": [1, "é", None]}),
    ({"type": "string", "pattern": "^[a-c]{2,5}$"}, lambda v: re.fullmatch("[a-c]{2,5}", v) is not None),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_sampled_json_validates(kind: Kind, case: int) -> None:
    schema, valid = CASES[case]
    for seed in range(6):
        text = sampled(kind, kind.guides.json_schema(schema), 10 * case + seed)
        assert valid(json.loads(text)), text


def test_sampled_json_objects_parse(kind: Kind) -> None:
    values = [json.loads(sampled(kind, kind.guides.json_object(), seed, 2000)) for seed in range(3)]
    assert all(isinstance(value, dict) for value in values) and any(values)


def test_sampled_regexes_match_as_a_whole(kind: Kind) -> None:
    pattern = r"(19|20)\d{2}-[01][0-9] \p{Lu}\p{Ll}{1,4}!?"
    for seed in range(6):
        text = sampled(kind, kind.guides.regex(pattern), seed)
        assert re.fullmatch(r"(19|20)\d{2}-[01][0-9] \w{2,5}!?", text), text


def test_sampled_choices_are_one_of_them(kind: Kind) -> None:
    texts = ["yes", "no", 'a"b\\c', "x|y", "é\u2028中", "\x01\n", "yes, but", "{1}"]
    found = {sampled(kind, kind.guides.choice(texts), seed) for seed in range(25)}
    assert found <= set(texts) and len(found) >= 4
    for text in texts:
        assert walk(kind, kind.guides.choice(texts), text).complete


def test_only_the_end_may_follow_what_is_complete(kind: Kind) -> None:
    guide = walk(kind, kind.guides.json_schema(PERSON), '{"name": "é\\n", "age": 3}')
    assert guide.complete and np.flatnonzero(bits(guide.mask())).tolist() == list(kind.eos)
    assert not guide.finished
    guide.accept(kind.eos[0])
    assert guide.finished
    for call in (guide.mask, lambda: guide.accept(kind.eos[0])):
        with pytest.raises(DataError, match="structured output"):
            call()


def test_a_copy_goes_its_own_way(kind: Kind) -> None:
    guide = walk(kind, kind.guides.choice(["abc", "abd"]), "a")
    other = guide.copy()
    assert walk(kind, guide, "bc").complete and walk(kind, other, "bd").complete
    guide.accept(kind.eos[0])
    assert guide.copy().finished and not other.finished


def test_spaces_between_tokens_are_bounded(kind: Kind) -> None:
    (space,) = kind.tokenizer.encode_text(" ")
    guide = walk(kind, kind.guides.json_schema(PERSON), "{")
    given = 0
    while bits(guide.mask())[space] and given < 100:
        guide.accept(space)
        given += 1
    assert 1 <= given <= 40


def test_what_the_grammar_forbids_is_not_accepted(kind: Kind) -> None:
    guide = walk(kind, kind.guides.json_schema(PERSON), '{"name"')
    (letter,) = kind.tokenizer.encode_text("x")
    assert not bits(guide.mask())[letter] and not bits(guide.mask())[list(kind.eos)].any()
    with pytest.raises(DataError, match=f"token id {letter} may not follow"):
        guide.accept(letter)


def test_control_strings_can_be_written_only_as_text(kind: Kind) -> None:
    """A schema that demands a control string is answered by its letters, never by its id."""
    name = next(name for name, index in kind.tokenizer.control.items() if index in kind.forbidden)
    guide = kind.guides.choice([name])
    assert not bits(guide.mask())[kind.forbidden].any()
    assert kind.tokenizer.control[name] not in kind.tokenizer.encode_text(name)
    assert walk(kind, guide, name).complete


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return {"enum": [value]}


BAD: list[tuple[str, Any, str]] = [
    ("json_schema", True, "the JSON schema is bool; expected an object"),
    ("json_schema", {"type": "nonsense"}, "the JSON schema cannot be used: Invalid type: nonsense"),
    ("json_schema", {"not": {}}, 'cannot be used: Unimplemented keys: \\["not"\\]'),
    ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
    ("json_schema", {"x-guidance": {"other": 1}}, "cannot be used: unknown field"),
    ("json_schema", {"$ref": "http://127.0.0.1:9/x"}, "does not fetch"),
    ("json_schema", {"$ref": "#/nowhere"}, "does not exist"),
    ("json_schema", {"enum": []}, "Unsatisfiable"),
    ("json_schema", {"const": float("nan")}, "is not JSON"),
    ("json_schema", {"const": {1, 2}}, "is not JSON"),
    ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
    ("json_schema", nested(63), "nested more than 64 deep"),
    ("json_schema", nested(100_000), "nested more than 64 deep"),
    ("json_schema", {"const": "x" * MAX_SCHEMA_BYTES}, f"expected at most {MAX_SCHEMA_BYTES}"),
    ("regex", "", "not a string, or empty"),
    ("regex", 3, "not a string, or empty"),
    ("regex", "(", "the regular expression cannot be used: .*unclosed group"),
    ("regex", "(?=x)y", "look-around"),
    ("regex", r"(a)\1", "cannot be used"),
    ("regex", "(" * 2000 + "a" + ")" * 2000, "cannot be used"),
    ("regex", "a" * (MAX_REGEX + 1), f"expected at most {MAX_REGEX}"),
    ("regex", "\ud800", "lone surrogate"),
    ("choice", [], "list of 1 to 1000 non-empty strings"),
    ("choice", "yes", "list of 1 to 1000 non-empty strings"),
    ("choice", ["a", ""], "non-empty strings"),
    ("choice", ["a"] * (MAX_CHOICES + 1), "list of 1 to 1000"),
    ("choice", ["a\udfff"], "lone surrogate"),
    ("choice", ["x" * MAX_SCHEMA_BYTES, "y"], f"more than {MAX_SCHEMA_BYTES} bytes"),
]


@pytest.mark.parametrize(
    ("method", "value", "message"), BAD, ids=[f"{m}-{i}" for i, (m, _, _) in enumerate(BAD)]
)
def test_what_cannot_be_used_is_said_in_one_line(kind: Kind, method: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        getattr(kind.guides, method)(value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_tokenizer_must_have_bytes_and_an_end() -> None:
    tokenizer = Tokenizer.bytes()
    with pytest.raises(ConfigError, match="needs an end-of-sequence id"):
        Guides(tokenizer, 300, (299,))
    tokenizer.byte_level = False
    with pytest.raises(ConfigError, match="needs a byte-level tokenizer"):
        Guides(tokenizer, 300, tokenizer.eos_ids)
