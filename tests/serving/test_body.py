"""JSON bodies: what is refused at once, and that ordinary ones pass."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv3_jax.serving.api_errors import ApiError
from dsv3_jax.serving.body import MAX_DEPTH, parse_json
from dsv3_jax.serving.schemas import ChatRequest, GenerateRequest, validate


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e400}',
        b'{"a": -1e400}',
        b'{"a": 12345678901234567890}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": [1, {"c": 1, "c": 1}]}}',
        b'{"a": "\\ud800"}',
        b'{"a": ["x", {"\\udfff": 1}]}',
        b'{"a": "\\udc00\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        b"[" * 100_000,
        b'{"a": 1} {}',
        b"\xef\xbb\xbf{}",
    ],
)
def test_refused_with_one_code_and_without_a_word_of_it(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert "ud800" not in caught.value.message and "12345" not in caught.value.message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, max_size=4), st.booleans())
def test_every_ordinary_object_is_read_as_it_is(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_pairs_of_surrogates_are_characters() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "seed": True}, "seed"),
        ({"prompt": "a", "max_new_tokens": "5"}, "max_new_tokens"),
        ({"prompt_token_ids": [1, "x"]}, "prompt_token_ids[1]"),
        ({"prompt": "a", "logit_bias": {"secret": 1}}, "logit_bias"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
def test_errors_name_the_field_and_no_value(body: dict[str, object], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(GenerateRequest, body)
    assert caught.value.param == param and "secret" not in json.dumps(caught.value.body())


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "hi"}], "stop": ["x", ""]}, "stop[1]"),
        ({"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": 1}, "stream": True},
         "stream_options.include_usage"),
    ],
)  # fmt: skip
def test_a_field_is_named_as_chats_name_it(more: dict[str, Any], param: str) -> None:
    """`turns` writes places in a conversation with brackets too."""
    with pytest.raises(ApiError) as caught:
        validate(ChatRequest, {"model": "m", **more})
    assert caught.value.param == param
