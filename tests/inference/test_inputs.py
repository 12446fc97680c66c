"""Reading prompt files: what a line becomes, and that every bad line is told apart and stays alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference.inputs import Line, PromptReader
from dsv3_jax.inference.load import OpenedModel
from dsv3_jax.inference.options import Sampling, check
from dsv3_jax.text import Tokenizer
from tests.inference import tiny


def reader(tokenizer: Tokenizer | None = None, **defaults: Any) -> PromptReader:
    def load() -> Any:
        raise AssertionError("reading prompts needs no weights")

    tokenizer = tokenizer or Tokenizer.bytes()
    model = OpenedModel(tiny.V3, tokenizer, (257,), None, [], load, [])
    return PromptReader(model, Sampling(**{"max_new_tokens": 8, **defaults}))


def read(tmp_path: Path, content: str | bytes, name: str = "in.jsonl", **defaults: Any) -> list[Line]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(reader(**defaults).read(path))


def ids(line: Line) -> list[int]:
    assert line.request is not None, line.error
    return list(line.request.ids)


def test_text_lines_end_at_newlines_only(tmp_path: Path) -> None:
    lines = read(tmp_path, "\ufeffab\r\n\nc\u2028d\x0c\n é", "in.txt")
    assert [ids(line) for line in lines] == [
        [256, *text.encode()] for text in ("ab", "", "c\u2028d\x0c", " é")
    ]
    assert [line.id for line in lines] == [0, 1, 2, 3]


def test_a_text_line_that_is_not_utf8_stays_alone(tmp_path: Path) -> None:
    good, bad = read(tmp_path, b"fine\nb\xffd\n", "in.txt")
    assert good.request is not None and bad.request is None
    assert "byte 1 is 0xff" in str(bad.error)


def test_the_three_kinds_of_prompt(tmp_path: Path) -> None:
    lines = read(
        tmp_path,
        '{"prompt": "hi", "id": "x"}\n{"prompt_token_ids": [5, 256]}\n'
        '{"messages": [{"role": "user", "content": "<|eos|>"}], "id": 7}\n{"prompt": ""}\n',
    )
    assert ids(lines[0]) == [256, 104, 105]
    assert ids(lines[1]) == [5, 256], "ids are used as they are: no BOS"
    assert ids(lines[2]) == [256, *b"User: <|eos|>\n\nAssistant:"], "BOS once; control strings stay text"
    assert ids(lines[3]) == [256]
    assert [line.id for line in lines] == ["x", 1, 7, 3]


def test_a_line_overrides_the_flags(tmp_path: Path) -> None:
    own = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 9,
        "stop": ["a", "b"],
        "logprobs": 0,
        "prompt_logprobs": 1,
        "ignore_eos": True,
    }
    first, second, third = read(
        tmp_path,
        json.dumps({"prompt": "x", **own}) + '\n{"prompt": "x", "stop": "z", "seed": null}\n{"prompt": "x"}',
        temperature=1.5,
        seed=4,
    )
    assert first.request is not None and second.request is not None and third.request is not None
    assert first.request.sampling == Sampling(**{**own, "stop": ("a", "b")})
    assert second.request.sampling == Sampling(8, temperature=1.5, seed=4, stop=("z",))
    assert third.request.sampling == Sampling(8, temperature=1.5, seed=4)


BAD = [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[1]", "expected a JSON object"),
    ('"text"', "expected a JSON object"),
    ("{}", "exactly one of prompt, prompt_token_ids and messages is needed; found none"),
    ('{"prompt": "a", "prompt_token_ids": [1]}', "found prompt and prompt_token_ids"),
    ('{"prompt": null}', "found none"),
    ('{"prompt": 3}', "prompt is int '3'; expected a string"),
    ('{"prompt": "\\ud800"}', "lone surrogate"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' is given twice"),
    ('{"prompt": "a", "temprature": 1}', "unknown key 'temprature'; did you mean 'temperature'?"),
    ('{"prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
    ('{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a JSON number"),
    ('{"prompt": "a", "temperature": 1e400}', "1e400 is too large"),
    ('{"prompt": "a", "temperature": -0.1}', "temperature is '-0.1'"),
    ('{"prompt": "a", "temperature": 1e-7}', "temperature is '1e-07'"),
    ('{"prompt": "a", "temperature": true}', "temperature is 'True'"),
    ('{"prompt": "a", "temperature": "1"}', "temperature is '1'"),
    ('{"prompt": "a", "top_p": 0}', "top_p is '0'"),
    ('{"prompt": "a", "top_p": 1.01}', "top_p is '1.01'"),
    ('{"prompt": "a", "top_k": -1}', "top_k is '-1'"),
    ('{"prompt": "a", "top_k": 1.5}', "top_k is '1.5'"),
    ('{"prompt": "a", "min_p": 2}', "min_p is '2'"),
    ('{"prompt": "a", "seed": -1}', "seed is '-1'"),
    ('{"prompt": "a", "seed": 99999999999999999999}', "seed is '99999999999999999999'"),
    ('{"prompt": "a", "max_new_tokens": -1}', "max_new_tokens is '-1'"),
    ('{"prompt": "a", "max_new_tokens": 9e9}', "max_new_tokens is"),
    ('{"prompt": "a", "max_new_tokens": 300}', "together more than the context of 256"),
    ('{"prompt": "a", "stop": ""}', "stop is"),
    ('{"prompt": "a", "stop": [""]}', "stop is"),
    ('{"prompt": "a", "stop": [1]}', "stop is"),
    ('{"prompt": "a", "stop": {"a": 1}}', "stop is"),
    ('{"prompt": "a", "logprobs": -1}', "logprobs is '-1'"),
    ('{"prompt": "a", "logprobs": 271}', "logprobs is 271; the vocabulary has 270 ids"),
    ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos is '1'"),
    ('{"prompt": "a", "id": [1]}', "id is list"),
    ('{"prompt": "a", "id": 1.5}', "id is float"),
    ('{"prompt": "a", "id": "\\udc00"}', "id holds a lone surrogate"),
    ('{"prompt_token_ids": []}', "no tokens"),
    ('{"prompt_token_ids": "1 2"}', "expected a list of token ids"),
    ('{"prompt_token_ids": [1, 2.0]}', "holds float '2.0'"),
    ('{"prompt_token_ids": [true]}', "holds bool"),
    ('{"prompt_token_ids": [270]}', "token id 270 is out of range"),
    ('{"prompt_token_ids": [-1]}', "token id -1 is out of range"),
    ('{"prompt_token_ids": [99999999999999999999]}', "out of range"),
    ('{"messages": []}', "messages"),
    ('{"messages": [{"role": "king", "content": "a"}]}', "messages[0].role is 'king'"),
    ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", "not valid JSON"),
    ('{"prompt": "a\\u0000b", "stop": "\ud800"}'.encode("utf-8", "surrogatepass"), "not valid JSON"),
    ('{"prompt": "a", "logit_bias": [[5, 1]]}', "expected an object of biases by token id"),
    ('{"prompt": "a", "logit_bias": {"-5": 1}}', "logit_bias names token id '-5'"),
    ('{"prompt": "a", "logit_bias": {"5": 1000}}', "each with a bias from -100 to 100"),
    ('{"prompt": "a", "logit_bias": {"270": 1}}', "names token id 270; expected 0 <= id < vocab_size = 270"),
    ('{"prompt": "a", "stop_token_ids": 5}', "at most 16 different token ids"),
    ('{"prompt": "a", "min_tokens": 9}', "min_tokens is 9; expected at most max_new_tokens = 8"),
]


@pytest.mark.parametrize(("raw", "message"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_line_says_what_was_expected(tmp_path: Path, raw: str | bytes, message: str) -> None:
    raw = raw.encode() if isinstance(raw, str) else raw
    bad, good = read(tmp_path, raw + b'\n{"prompt": "fine"}\n')
    assert bad.request is None and message in str(bad.error), bad.error
    assert len(str(bad.error)) < 400
    assert good.request is not None


def test_a_bad_line_keeps_its_id(tmp_path: Path) -> None:
    (line,) = read(tmp_path, '{"id": "mine", "prompt": 1}')
    assert line.id == "mine"


def test_empty_lines_at_the_end_are_none(tmp_path: Path) -> None:
    assert len(read(tmp_path, '{"prompt": "a"}\n\n \n')) == 1
    assert [line.error is None for line in read(tmp_path, '{"prompt": "a"}\n\n{"prompt": "a"}\n')] == [
        True,
        False,
        True,
    ]
    assert read(tmp_path, "") == []


def test_text_is_refused_where_only_ids_can_be_read(tmp_path: Path) -> None:
    tiktoken = Tokenizer({"tiktoken.model": b"YQ== 0\nYg== 1\n"}, origin="the folder")
    for fields in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        with pytest.raises(DataError, match=r"tiktoken\.model.*prompt_token_ids"):
            reader(tiktoken).request(0, fields)
    assert list(reader(tiktoken).request(0, {"prompt_token_ids": [1]}).ids) == [1]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a \.txt"):
        read(tmp_path, "a", "in.csv")
    with pytest.raises(ConfigError, match="No such file"):
        list(reader().read(tmp_path / "missing.txt"))


def test_biases_and_stop_ids_are_read_from_json(tmp_path: Path) -> None:
    content = '{"prompt": "a", "logit_bias": {"5": -100, "269": 1.5}, "stop_token_ids": [3, 4]}'
    (line,) = read(tmp_path, content)
    assert line.request is not None, line.error
    assert line.request.sampling.logit_bias == ((5, -100), (269, 1.5))
    assert line.request.sampling.stop_token_ids == (3, 4)


def test_flags_are_checked_like_keys() -> None:
    with pytest.raises(ConfigError, match="--top-p is '0'; expected a number above 0"):
        check(Sampling(top_p=0), ConfigError, "--", dash=True)
