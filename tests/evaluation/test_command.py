"""The command: tasks from files, results, a run that goes on, and errors that name the line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.evaluation import __main__ as command
from dsv3_jax.evaluation import run
from dsv3_jax.evaluation.choose import choose_tasks
from dsv3_jax.evaluation.code import CodeOptions
from dsv3_jax.evaluation.command import window_note
from dsv3_jax.evaluation.prompts import Part, TextEncoder, text_prompt
from dsv3_jax.evaluation.scoring import Score, Text
from dsv3_jax.evaluation.subject import Answer, Model
from dsv3_jax.inference import Sampling
from dsv3_jax.inference.batch import Job
from dsv3_jax.text import Tokenizer
from tests.inference import tiny


class Fake:
    """A subject whose log-probability of a token is -id / 256, and that answers with what comes after "say "."""

    def __init__(self) -> None:
        self.encoder = TextEncoder(Tokenizer.bytes(), tiny.V3)
        self.context = 256
        self.asked: list[str] = []
        self.fails_after: int | None = None

    def score(self, texts: list[Text], done: Any = None) -> list[Score]:
        import numpy as np

        found = []
        for at, text in enumerate(texts):
            if self.fails_after is not None and at >= self.fails_after:
                raise KeyboardInterrupt
            ids = np.asarray(text.ids[text.start :])
            found.append(Score((-ids / 256).astype(np.float32), ids))
            if done is not None:
                done(at, found[-1])
        return found

    def answer(self, prompts: list[tuple[list[int], Sampling]], done: Any = None) -> list[Answer]:
        found: list[Answer] = []
        for at, (ids, _) in enumerate(prompts):
            text = bytes(i for i in ids if i < 256).decode()
            self.asked.append(text)
            found.append((text.rpartition("say ")[2], "stop"))
            if done is not None:
                done(at, found[-1])
        return found


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tasks(words: str, **more: Any) -> list[Any]:
    return choose_tasks(words, CodeOptions(run_code=True), **more)


def test_choices_are_scored_after_the_prompt_alone(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "q.jsonl",
        {"prompt": "x", "choices": ["AA", "zzz"], "answer": 0},  # A = 65, z = 122, a space = 32
        {"prompt": "zzzz", "choices": ["zzz", "AAAAAAAAA"], "answer": 1},
    )
    (task,) = tasks(f"multiple_choice:{file}")
    (records,) = run.evaluate(Fake(), [task])
    assert records[0]["scores"] == pytest.approx([-(32 + 130) / 256, -(32 + 366) / 256])
    found = {name: metric.value for name, metric in task.metrics(records).items()}
    assert found == {"acc": 0.5, "acc_norm": 1.0, "acc_bytes": 1.0}


def test_perplexity_counts_tokens_and_bytes(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("A" * 600)
    (task,) = tasks(f"perplexity:{text}", window=100)
    (records,) = run.evaluate(Fake(), [task])
    found = task.metrics(records)
    assert sum(records[0]["window_tokens"]) == 600 and len(records[0]["window_tokens"]) == 6
    assert found["perplexity"].value == pytest.approx(math.exp(65 / 256))
    assert found["bits_per_byte"].value == pytest.approx(65 / 256 / math.log(2))
    assert found["next_token_accuracy"].value == 1.0


def test_a_window_that_the_run_was_not_trained_on_is_told(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "300"
    step.mkdir(parents=True)
    assert "--window: fewer" in window_note(step, 1024)
    (tmp_path / "run" / "config.yaml").write_text("training: {seq_len: 256}")
    for checkpoint in (step, tmp_path / "run"):
        assert "windows of 1024 tokens" in window_note(checkpoint, 1024)
        assert window_note(checkpoint, 1024).endswith("give --window 256")
    assert "--window: fewer" in window_note(tmp_path / "run", 256)
    (tmp_path / "run" / "config.yaml").write_text("training: [not, ours]")
    assert "--window: fewer" in window_note(tmp_path / "run", 1024)


def test_a_yaml_task_has_templates_shots_and_a_pattern(tmp_path: Path) -> None:
    lines(
        tmp_path / "q.jsonl", {"question": "say 7 and 42.", "gold": "42"}, {"question": "say no", "gold": "1"}
    )
    lines(tmp_path / "shots.jsonl", {"question": "one?", "gold": "1"}, {"question": "two?", "gold": "2"})
    (tmp_path / "sums.yaml").write_text(
        "task: exact_match\ndata: q.jsonl\nshots_data: shots.jsonl\nshots: 2\nmax_new_tokens: 8\npattern: '\\d+'\n"
        "fields: {prompt: 'Q: {question}', answer: gold}\nseparator: '|'\n"
    )
    subject = Fake()
    (task,) = tasks(str(tmp_path / "sums.yaml"))
    (records,) = run.evaluate(subject, [task])
    assert subject.asked[0] in (
        "Q: one? 1|Q: two? 2|Q: say 7 and 42.",
        "Q: two? 2|Q: one? 1|Q: say 7 and 42.",
    )
    assert [record["exact_match"] for record in records] == [1, 0]
    assert task.spec.name == "sums"


def test_examples_from_the_items_leave_the_item_out(tmp_path: Path) -> None:
    file = lines(tmp_path / "e.jsonl", *({"prompt": f"p{n}.", "answer": f"a{n}"} for n in range(4)))
    subject = Fake()
    (task,) = tasks(f"exact_match:{file}", shots=3, max_new_tokens=8)
    run.evaluate(subject, [task])
    for at, asked in enumerate(subject.asked):
        assert f"a{at}" not in asked and all(f"p{n}. a{n}" in asked for n in range(4) if n != at)


def test_code_passes_or_not_by_its_tests(tmp_path: Path) -> None:
    prompt = "def f(x):\n    # say "
    test = "def check(c):\n    assert c(3) == 6\n"
    good = {"prompt": prompt + "\n    return 2 * x", "entry_point": "f", "test": test}
    bad = {"prompt": prompt + "\n    return 3 * x", "entry_point": "f", "test": test}
    file = lines(tmp_path / "c.jsonl", good, bad)
    (task,) = tasks(f"code:{file}", max_new_tokens=8)
    (records,) = run.evaluate(Fake(), [task])
    assert [record["outcomes"][0][0] for record in records] == ["passed", "failed"]
    assert task.metrics(records)["pass@1"].value == 0.5
    with pytest.raises(ConfigError, match="--run-code"):
        choose_tasks(f"code:{file}", CodeOptions())
    with pytest.raises(ConfigError, match="--samples is 3 and --temperature 0"):
        CodeOptions(samples=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "q.jsonl: no records"),
        ("\n\n", "q.jsonl: no records"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n{bad\n', "line 2: not valid JSON"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            "line 1: answer is int '2'; expected an integer from 0",
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "line 1: answer is bool"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 1: choices is list"),
        ('{"choices": ["b", "c"], "answer": 0}', "line 1: prompt is missing"),
        ('{"prompt": [{"type": "text"}], "choices": ["b", "c"], "answer": 0}', "line 1: a part of prompt"),
        (
            '{"id": 1, "prompt": "a", "choices": ["b", "c"], "answer": 0}\n' * 2,
            "line 2: the id '1' was given before",
        ),
    ],
)
def test_a_bad_record_is_told_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        tasks(f"multiple_choice:{tmp_path / 'q.jsonl'}")
    assert message in str(caught.value) and caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--tasks is empty"),
        ("humanevil", "did you mean 'humaneval'"),
        ("multiple_choice", "names no file"),
        ("multiple_choice:nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("multiple_choice:a.csv", "expected a file that ends in .jsonl"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_an_unknown_task_is_told(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tasks(words)
    assert message in str(caught.value)


def test_what_is_too_long_or_not_text_names_its_line(tmp_path: Path) -> None:
    image = [{"type": "text", "text": "see"}, {"type": "image", "image": "a.png"}]
    for prompt, message in [
        ("x" * 300, "line 2: 3"),
        (image, "line 2: the prompt has a part of type 'image'"),
    ]:
        record = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
        file = lines(tmp_path / "q.jsonl", record, {**record, "prompt": prompt})
        (task,) = tasks(f"multiple_choice:{file}")
        with pytest.raises(DataError) as caught:
            run.evaluate(Fake(), [task])
        assert message in str(caught.value)


def test_a_pair_is_the_whole_texts_ids() -> None:
    encoder = TextEncoder(Tokenizer.bytes(), tiny.V3)
    assert encoder.pair(text_prompt("a "), "b") == ([256, 97, 32, 98], 2)  # space goes with the continuation
    assert encoder.pair((Part("text", "a"), Part("text", "b")), "c")[1] == 3
    assert encoder.pair(text_prompt(""), "c") == ([256, 99], 1)
    with pytest.raises(DataError, match="no tokens of its own"):
        encoder.pair(text_prompt("a"), "")


def test_the_command_goes_on_after_a_kill_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny.save(tmp_path)
    records = [{"prompt": f"p{n}", "choices": ["yes", "no", "maybe"], "answer": n % 3} for n in range(6)]
    lines(tmp_path / "q.jsonl", *records)
    lines(tmp_path / "e.jsonl", {"prompt": "p", "answer": "x"})
    words = f"multiple_choice:{tmp_path / 'q.jsonl'},exact_match:{tmp_path / 'e.jsonl'}"
    flags = [
        "evaluation",
        "--checkpoint",
        str(checkpoint),
        "--tasks",
        words,
        "--items",
        "--max-new-tokens",
        "4",
    ]

    def evaluate(*more: object) -> int:
        monkeypatch.setattr(sys, "argv", [*flags, *map(str, more)])
        return command.main()

    out, whole = tmp_path / "out.json", tmp_path / "whole.json"
    assert evaluate("--out", whole) == 0
    table = capsys.readouterr().out
    assert "acc_bytes" in table and "exact_match" in table
    add, count = run.Store.add, 0

    def killed(self: run.Store, *arguments: Any) -> None:
        nonlocal count
        if count == 4:
            raise KeyboardInterrupt
        count += 1
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.Store, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate("--out", out)
    assert not out.exists()
    with pytest.raises(ConfigError, match="another"):
        evaluate("--out", out, "--limit", 3)
    assert evaluate("--out", out, "--against", whole) == 0
    assert "4 of 6 items are done" in capsys.readouterr().err
    assert not out.with_name("out.json.partial").exists()
    ours, theirs = (json.loads(path.read_text())["tasks"] for path in (out, whole))
    for name, task in ours.items():
        against = task.pop("against")
        assert against["difference"]["value"] == 0 and against["agreement"]["value"] == 1
        assert task == theirs[name]
    with pytest.raises(ConfigError, match="--force"):
        evaluate("--out", out)


def test_a_mesh_gives_the_scores_of_one_device(tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path)
    texts = [Text(tiny.prompt(n, n), 1) for n in (5, 20, 12)]
    found = []
    for mesh in (None, "data=2,expert=4"):
        job = Job(checkpoint, Sampling(), batch_size=4, mesh=mesh)
        found.append([score.total for score in Model(job, job.open()).score(texts)])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
