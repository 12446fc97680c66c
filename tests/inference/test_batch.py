"""Jobs over prompt files: the output's contract, stop strings, bad lines, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.inference import Sampling, batch
from dsv3_jax.inference.batch import Job, TextWatch, run_file, run_prompt
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.load import open_model
from dsv3_jax.text import Tokenizer
from tests.inference import tiny

SAMPLING = Sampling(max_new_tokens=12, temperature=1.0, logprobs=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(checkpoint: Path) -> Job:
    return Job(checkpoint, SAMPLING, batch_size=4)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_the_output_of_a_file(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "abc", "id": "first"},
        {"prompt_token_ids": tiny.prompt(40), "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "hi"}], "prompt_logprobs": 0},
        {"prompt": "abc", "max_new_tokens": 0, "prompt_logprobs": 2},
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run_file(job, source, output) == 0
    found = records(output)
    assert [record["id"] for record in found] == ["first", 1, 2, 3]
    tokenizer = Tokenizer.bytes()
    for record in found:
        assert record["text"] == tokenizer.decode(record["token_ids"])
        assert record["completion_tokens"] == len(record["token_ids"]) == len(record["logprobs"])
        assert record["finish_reason"] in ("stop", "length")
        assert all(
            entry["token_id"] == token
            for entry, token in zip(record["logprobs"], record["token_ids"], strict=True)
        )
        assert all(index < tiny.VOCAB_LIMIT for index in record["token_ids"])
    assert [record["prompt_tokens"] for record in found] == [4, 40, len(b"User: hi\n\nAssistant:") + 1, 4]
    assert ["prompt_logprobs" in record for record in found] == [False, False, True, True]
    scored = found[3]
    assert (scored["token_ids"], scored["text"], scored["finish_reason"]) == ([], "", "length")
    assert scored["prompt_logprobs"][0] is None and len(scored["prompt_logprobs"]) == 4
    assert [entry["token_id"] for entry in scored["prompt_logprobs"][1:]] == [97, 98, 99]
    assert all(len(entry["top"]) == 2 for entry in scored["prompt_logprobs"][1:])
    progress = capsys.readouterr().err
    assert "tokens/s" in progress and "4 lines, 0 failed" in progress


def test_lines_do_not_depend_on_the_file(job: Job, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * at, "id": at, "seed": at % 2} for at in range(7)]
    run_file(job, write(tmp_path / "a.jsonl", rows), tmp_path / "a.out")
    whole = {record["id"]: record for record in records(tmp_path / "a.out")}
    run_file(job, write(tmp_path / "b.jsonl", [rows[5], "broken\n", rows[2]]), tmp_path / "b.out")
    first, _, last = records(tmp_path / "b.out")
    assert (first, last) == (whole[5], whole[2])


def test_a_bad_line_fails_alone(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "ok"}, "{nonsense\n", {"prompt": "ok", "id": "me", "top_p": 7}, {"prompt": "z" * 300}]
    assert run_file(job, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 65
    found = records(tmp_path / "out.jsonl")
    assert found[0]["finish_reason"] in ("stop", "length")
    for record in found[1:]:
        assert set(record) == {"id", "finish_reason", "error"} and record["finish_reason"] == "error"
    assert [record["id"] for record in found] == [0, 1, "me", 3]
    assert "context of 256" in found[3]["error"]
    assert "line 2: not valid JSON" in capsys.readouterr().err


def test_a_line_that_the_pages_cannot_hold_fails_alone(job: Job, tmp_path: Path) -> None:
    rows = [{"prompt": "ok"}, {"prompt": "z" * 200}, {"prompt": "fine"}]
    few = dataclasses.replace(job, pages=3)
    assert run_file(few, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl") == 65
    found = records(tmp_path / "out.jsonl")
    assert [record["finish_reason"] == "error" for record in found] == [False, True, False]
    assert "more than the cache of 2 pages of 64 tokens" in found[1]["error"]
    for name in ("page_size", "pages"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is 0"):
            dataclasses.replace(job, **{name: 0})


def test_a_stop_string_ends_the_text_across_tokens(job: Job, tmp_path: Path) -> None:
    # Free choice among ASCII, so that stop strings are found inside the text, one byte a token.
    plain = dataclasses.replace(
        job, sampling=dataclasses.replace(SAMPLING, max_new_tokens=40, ignore_eos=True)
    )
    source = write(tmp_path / "in.jsonl", [{"prompt": "tell"}])
    run_file(plain, source, tmp_path / "plain.jsonl")
    (whole,) = records(tmp_path / "plain.jsonl")
    text = whole["text"]
    at = next(at for at in range(3, len(text) - 2) if text.isascii() or text[at : at + 2].isascii())
    stop = text[at : at + 2]
    cut = text.index(stop)
    rows = [{"prompt": "tell", "stop": [stop, "never there"]}]
    run_file(plain, write(tmp_path / "in2.jsonl", rows), tmp_path / "stopped.jsonl")
    (found,) = records(tmp_path / "stopped.jsonl")
    assert (found["text"], found["finish_reason"]) == (text[:cut], "stop")
    tokens = found["token_ids"]
    assert tokens == whole["token_ids"][: len(tokens)], "the ids include those of the stop string"
    assert Tokenizer.bytes().decode(tokens).endswith(stop)
    assert len(found["logprobs"]) == found["completion_tokens"] == len(tokens)


def test_text_watch_counts_the_tokens_it_keeps() -> None:
    watch = TextWatch(Tokenizer.bytes(), ("stop",))
    assert watch.push(list(b"a st")) is None
    assert watch.push(list(b"op it")) == 2
    assert watch.stopped and watch.finish() == "a "
    open_end = TextWatch(Tokenizer.bytes(), ("stop",))
    assert open_end.push([*b"a sto", 0xC3]) is None
    assert open_end.finish() == "a sto\ufffd"


class Killed(BaseException):
    """Stands for a process that ends at once."""


def test_a_stopped_job_goes_on_and_ends_the_same(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "p" * at, "max_new_tokens": 5} for at in range(10)]
    rows.insert(3, "bad\n")  # type: ignore[arg-type]
    source = write(tmp_path / "in.jsonl", rows)
    assert run_file(job, source, tmp_path / "whole.jsonl") == 65
    run, output = Engine.run, tmp_path / "out.jsonl"
    asked: list[int] = []

    def stopping(self: Engine, requests: Any, watch: Any = None) -> Any:
        asked.append(len(requests))
        finished = 0
        for found in run(self, requests, watch):
            yield found
            finished += len(found)
            if finished >= 4 and len(asked) < 3:
                raise Killed

    monkeypatch.setattr(Engine, "run", stopping)
    for _ in range(2):
        with pytest.raises(Killed):
            run_file(job, source, output)
        assert not output.exists()
    assert run_file(job, source, output) == 65
    assert asked == [10, 6, 2], "only missing prompts run again"
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("change", ["input", "settings", "checkpoint"])
def test_a_partial_file_of_another_job_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"

    def stopping(self: Engine, requests: Any, watch: Any = None) -> Any:
        yield []
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "run", stopping)
        with pytest.raises(Killed):
            run_file(job, source, output)
    if change == "input":
        write(source, [{"prompt": "a"}])
    elif change == "settings":
        job = dataclasses.replace(job, sampling=dataclasses.replace(SAMPLING, seed=1))
    else:
        other = dict(
            tiny.variables("v3"), params={**tiny.variables("v3")["params"], "final_norm_D": jnp.full(48, 2.0)}
        )
        job = dataclasses.replace(job, checkpoint=tiny.save(tmp_path, tree=other))
    with pytest.raises(ConfigError, match=f"another {change}"):
        run_file(job, source, output)
    assert run_file(dataclasses.replace(job, force=True), source, output) == 0


def test_an_existing_output_needs_force(job: Job, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.txt", ["one\n"]), tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(ConfigError, match="exists; give --force"):
        run_file(job, source, output)
    assert output.read_text() == "precious"
    assert run_file(dataclasses.replace(job, force=True), source, output) == 0
    assert records(output)[0]["prompt_tokens"] == 4


def test_an_empty_file_gives_an_empty_file(job: Job, tmp_path: Path) -> None:
    assert run_file(job, write(tmp_path / "in.txt", []), tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_wrong_paths_and_flags(job: Job, tmp_path: Path) -> None:
    source = write(tmp_path / "in.txt", ["a\n"])
    with pytest.raises(ConfigError, match="no such file"):
        run_file(job, tmp_path / "none.txt", tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="existing folder"):
        run_file(job, source, tmp_path / "none" / "out.jsonl")
    with pytest.raises(ConfigError, match="is the input"):
        run_file(dataclasses.replace(job, force=True), source, source)
    with pytest.raises(ConfigError, match="no such folder"):
        run_file(dataclasses.replace(job, checkpoint=tmp_path / "none"), source, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="--batch-size is 0"):
        dataclasses.replace(job, batch_size=0)
    with pytest.raises(ConfigError, match="--logprobs is 300; the vocabulary has 270 ids"):
        run_file(dataclasses.replace(job, sampling=Sampling(logprobs=300)), source, tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]


def test_a_prompt_streams_what_a_file_gives(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = dataclasses.replace(SAMPLING, ignore_eos=True, max_new_tokens=30)
    run_file(
        dataclasses.replace(job, sampling=sampling),
        write(tmp_path / "in.txt", ["hello\n"]),
        tmp_path / "out.jsonl",
    )
    (record,) = records(tmp_path / "out.jsonl")
    pieces: list[str] = []
    with pytest.raises(ConfigError, match="--logprobs needs"):
        run_prompt(dataclasses.replace(job, sampling=sampling), "hello", pieces.append)
    monkeypatch.setattr(batch, "_NOT_SHOWN", ())  # with logprobs the program is the file's, compiled already
    assert run_prompt(dataclasses.replace(job, sampling=sampling), "hello", pieces.append) == 0
    assert "".join(pieces) == record["text"] + "\n"
    assert len(pieces) > 5
    with pytest.raises(DataError, match="context of 256"):
        run_prompt(dataclasses.replace(job, sampling=sampling), "z" * 300, pieces.append)


def test_opened_models(checkpoint: Path) -> None:
    model = open_model(checkpoint)
    assert (model.cfg, model.eos_ids, model.vocab_limit) == (tiny.V3, (11, 257), 258)
    assert open_model(checkpoint, "bfloat16").cfg.dtype == "bfloat16"


def test_the_progress_begins_when_all_is_compiled(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    warm, progress = Engine.warm, batch.Progress
    monkeypatch.setattr(Engine, "warm", lambda engine: (order.append("warm"), warm(engine))[1])
    monkeypatch.setattr(batch, "Progress", lambda *args: (order.append("progress"), progress(*args))[1])
    assert run_file(job, write(tmp_path / "in.jsonl", [{"prompt": "ab"}]), tmp_path / "out.jsonl") == 0
    assert order[:2] == ["warm", "progress"]
