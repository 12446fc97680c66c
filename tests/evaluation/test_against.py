"""Results are compared only with results of the same items, and what cannot be compared is told before any work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation import run
from tests.evaluation.test_command import Fake, lines, tasks


def made(words: str, **more: Any) -> tuple[list[Any], Any, dict[str, Any]]:
    """Tasks, their records and results with items."""
    found = tasks(words, **more)
    records = run.evaluate(Fake(), found)
    return found, records, run.results(found, records, {}, items=True)


QUESTIONS = [{"prompt": f"p{n}", "choices": ["yes", "no"], "answer": n % 2} for n in range(4)]


def test_other_questions_of_as_many_lines_are_not_the_same_items(tmp_path: Path) -> None:
    file = lines(tmp_path / "q.jsonl", *QUESTIONS)
    ours, _, found = made(f"multiple_choice:{file}")
    run.check_against(ours, found)
    lines(file, *QUESTIONS[1:], QUESTIONS[0])
    with pytest.raises(ConfigError, match="other items"):
        run.check_against(tasks(f"multiple_choice:{file}"), found)
    with pytest.raises(ConfigError, match="other items"):
        run.check_against(tasks(f"multiple_choice:{file}", limit=2), found)


def test_results_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    ours, _, found = made(f"multiple_choice:{lines(tmp_path / 'q.jsonl', *QUESTIONS)}")
    broken = copy.deepcopy(found)
    del broken["tasks"]["multiple_choice:q"]["records"][2]["acc"]
    with pytest.raises(ConfigError, match=r"not whole.*acc"):
        run.check_against(ours, broken)
    del broken["tasks"]["multiple_choice:q"]["records"]
    with pytest.raises(ConfigError, match="--items"):
        run.check_against(ours, broken)


def test_texts_in_other_tokens_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, records, found = made(f"perplexity:{lines(tmp_path / 't.jsonl', {'text': 'AAAA'}, {'text': 'BB'})}")
    same = run.results(ours, records, {}, against=found)["tasks"]["perplexity:t"]
    assert same["against"]["agreement"]["value"] == 1
    other = copy.deepcopy(found)
    record = other["tasks"]["perplexity:t"]["records"][0]
    record.update(window_tokens=[2], likeliest=[65, 65], window_nats=[1.0])
    run.check_against(ours, other)
    assert "against" not in run.results(ours, records, {}, against=other)["tasks"]["perplexity:t"]
    assert "other tokens" in capsys.readouterr().err
