"""Tasks: what is asked of a model, and what its answers are worth.

A task is a list of items and two functions: `run` asks a `Subject` about some of them and gives a record for each as
soon as it has one; `metrics` makes figures of all records. Records are JSON, so a run that was killed goes on with
those that are there. An item's prompt is a tuple of parts; the tasks below hold text, and a task for a model that reads
more needs nothing new here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.evaluation import metrics
from dsv3_jax.evaluation.metrics import Metric
from dsv3_jax.evaluation.prompts import TEXT, Part, Prompt, joined
from dsv3_jax.evaluation.records import Fields, Record, Row, Spec, check_names
from dsv3_jax.evaluation.scoring import Text
from dsv3_jax.evaluation.subject import Subject
from dsv3_jax.evaluation.windows import windows
from dsv3_jax.inference import Sampling

Done = Callable[[int, Record], None]
Metrics = dict[str, Metric]


class Task(Protocol):
    """What `run.evaluate` needs of a task.

    Attributes:
      spec: its name and options, for the results.
      names: of its items, each different.
      content: what a run that goes on must find unchanged.
      missing: protection that a sandbox did not give; most tasks need none.
    """

    spec: Spec
    names: list[str]
    content: Any
    missing: tuple[str, ...]

    def run(self, subject: Subject, items: Sequence[int], done: Done) -> None:
        """Ask about these items; `done` gets (item, record) for each. Raises DataError naming an item's line."""

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Figures of all items' records, in order; the first is the one that formats are compared by."""

    def value(self, record: Record) -> float:
        """An item's worth, whose mean is compared between models."""


class Rows:
    """Rows as items, with `Fields` to read them."""

    missing: tuple[str, ...] = ()

    def __init__(self, spec: Spec, rows: Sequence[Row], shots: Sequence[Row] | None = None) -> None:
        self.spec, self._rows = spec, rows
        self._shots = rows if shots is None else shots
        self._own = shots is None
        if spec.shots > len(self._shots) - self._own:
            raise ConfigError(
                f"{spec.name}: {spec.shots} shots of {len(self._shots)} examples; there are too few"
            )
        fields = [Fields(row, spec.fields) for row in rows]
        self.names = [one.name(at) for at, one in enumerate(fields)]
        self.content = [
            [row.fields for row in rows],
            None if shots is None else [row.fields for row in shots],
        ]
        check_names(zip(self.names, (row.where for row in rows), strict=True))

    def fields(self, item: int) -> Fields:
        """Of an item."""
        return Fields(self._rows[item], self.spec.fields)

    def asked(self, item: int, answer: Callable[[Fields], str]) -> Prompt:
        """The prompt with its examples before it; other examples for each item where they are items themselves.

        Args: answer: the right answer of an example.
        """
        own = self.fields(item).prompt()
        if not self.spec.shots:
            return own
        pool = [at for at in range(len(self._shots)) if not (self._own and at == item)]
        chosen = random.Random(f"{self.spec.seed} {item if self._own else ''}").sample(pool, self.spec.shots)
        text = ""
        for at in chosen:
            example = Fields(self._shots[at], self.spec.fields)
            text += joined(example.prompt()) + self.spec.delimiter + answer(example) + self.spec.separator
        return (Part(TEXT, text), *own)


def at_line(where: str, ask: Callable[[], Any]) -> Any:
    """What `ask` gives; a DataError of it names the line."""
    try:
        return ask()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def fitting(text: Text, context: int, where: str) -> Text:
    """The text if the context holds it; raises DataError naming the line."""
    if len(text.ids) - 1 > context:  # the last token is only predicted
        raise DataError(f"{where}: {len(text.ids)} tokens are more than the context of {context} tokens")
    return text


def answerable(ids: Sequence[int], new: int, context: int, where: str) -> None:
    """Raises DataError naming the line where the prompt and the new tokens are more than the context."""
    if len(ids) + new > context:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens and max_new_tokens is {new}: together more than the context "
            f"of {context} tokens"
        )


class Perplexity(Rows):
    """How well texts are predicted: every token once, in windows (`windows.windows`)."""

    def __init__(self, spec: Spec, rows: Sequence[Row], window: int | None = None) -> None:
        super().__init__(dataclasses.replace(spec, shots=0), rows)
        self._window = window

    def run(self, subject: Subject, items: Sequence[int], done: Done) -> None:
        """See `Task`."""
        size = min(self._window or subject.context, subject.context)
        first = subject.encoder.first
        texts, whose = [], []
        for item in items:
            where = self._rows[item].where
            if first is None:
                raise DataError(f"{where}: the model has no id that a text could begin with")
            text = self.fields(item).text("text")
            ids = at_line(where, functools.partial(subject.encoder.text, text))
            for window in windows(ids, size, first):
                texts.append(window)
                whose.append(item)
        parts: dict[int, dict[int, Any]] = {item: {} for item in items}
        number = collections.Counter(whose)

        def part(at: int, score: Any) -> None:
            item = whose[at]
            parts[item][at] = score
            if len(parts[item]) == number[item]:
                found = [parts[item][key] for key in sorted(parts[item])]
                targets = [texts[key].ids[texts[key].start :] for key in sorted(parts[item])]
                likeliest = [int(i) for one in found for i in one.likeliest]
                right = sum(a == b for a, b in zip(likeliest, (i for t in targets for i in t), strict=True))
                done(
                    item,
                    {
                        "window_nats": [-one.total for one in found],
                        "window_tokens": [len(one.logprobs) for one in found],
                        "bytes": len(self.fields(item).text("text").encode()),
                        "right": right,
                        "likeliest": likeliest,
                    },
                )

        subject.score(texts, part)

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Errors over windows, for a single text too; of bits per byte over texts."""
        nats = [n for record in records for n in record["window_nats"]]
        tokens = [n for record in records for n in record["window_tokens"]]
        totals = [sum(record["window_nats"]) for record in records]
        return {
            "perplexity": metrics.perplexity(nats, tokens),
            "bits_per_byte": metrics.bits_per_byte(totals, [record["bytes"] for record in records]),
            "next_token_accuracy": metrics.ratio(
                [record["right"] for record in records], [sum(record["window_tokens"]) for record in records]
            ),
        }

    def value(self, record: Record) -> float:
        """Nats a token."""
        return sum(record["window_nats"]) / sum(record["window_tokens"])


class MultipleChoice(Rows):
    """Which of several continuations is likeliest.

    `acc` by log-likelihood, `acc_norm` by log-likelihood a character, `acc_bytes` a byte of UTF-8: the names and
    definitions of lm-evaluation-harness (`ConfigurableTask.process_results`).
    """

    def __init__(self, spec: Spec, rows: Sequence[Row], shots: Sequence[Row] | None = None) -> None:
        super().__init__(spec, rows, shots)
        for item in range(len(rows)):  # a bad record is told before anything is computed
            self._item(self.fields(item))
            self.fields(item).prompt()

    def _item(self, fields: Fields) -> tuple[tuple[str, ...], int]:
        choices = fields.texts("choices", 2)
        return choices, fields.index("answer", len(choices))

    def _right(self, fields: Fields) -> str:
        choices, answer = self._item(fields)
        return choices[answer]

    def run(self, subject: Subject, items: Sequence[int], done: Done) -> None:
        """See `Task`."""
        texts: list[Text] = []
        whose: list[tuple[int, int]] = []
        for item in items:
            where, (choices, _) = self._rows[item].where, self._item(self.fields(item))
            prompt = self.asked(item, self._right)
            for at, choice in enumerate(choices):
                ids, before = at_line(
                    where, functools.partial(subject.encoder.pair, prompt, self.spec.delimiter + choice)
                )
                texts.append(fitting(Text(ids, before), subject.context, where))
                whose.append((item, at))
        found: dict[int, dict[int, Any]] = {item: {} for item in items}

        def part(index: int, score: Any) -> None:
            item, at = whose[index]
            found[item][at] = score
            choices, answer = self._item(self.fields(item))
            if len(found[item]) == len(choices):
                scores = [found[item][at].total for at in range(len(choices))]
                chosen = metrics.best(scores)
                by_character = metrics.best_per_unit(scores, [len(text) for text in choices])
                by_byte = metrics.best_per_unit(scores, [len(text.encode()) for text in choices])
                done(
                    item,
                    {
                        "scores": scores,
                        "chosen": chosen,
                        "acc": int(chosen == answer),
                        "acc_norm": int(by_character == answer),
                        "acc_bytes": int(by_byte == answer),
                    },
                )

        subject.score(texts, part)

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Shares of right choices."""
        return {
            key: metrics.mean([record[key] for record in records]) for key in ("acc", "acc_norm", "acc_bytes")
        }

    def value(self, record: Record) -> float:
        """Whether the choice was right."""
        return float(record["acc"])


class ExactMatch(Rows):
    """Answers written out: greedy, and right if one of the expected texts (`metrics.exact_match`)."""

    def __init__(self, spec: Spec, rows: Sequence[Row], shots: Sequence[Row] | None = None) -> None:
        super().__init__(spec, rows, shots)
        for item in range(len(rows)):
            self.fields(item).texts("answer", 1)
            self.fields(item).prompt()

    def run(self, subject: Subject, items: Sequence[int], done: Done) -> None:
        """See `Task`."""
        stop = self.spec.stop or (("\n",) if self.spec.shots else ())
        options = Sampling(max_new_tokens=self.spec.max_new_tokens, stop=stop)
        prompts = []
        for item in items:
            where = self._rows[item].where
            prompt = self.asked(item, lambda fields: fields.texts("answer", 1)[0])
            ids = at_line(where, functools.partial(subject.encoder.prompt, prompt))
            answerable(ids, options.max_new_tokens, subject.context, where)
            prompts.append((ids, options))

        def one(index: int, answer: tuple[str, str]) -> None:
            item, text = items[index], answer[0]
            taken, answers = self._taken(text), self.fields(item).texts("answer", 1)
            right = metrics.exact_match(taken, answers, ignore_case=self.spec.ignore_case)
            done(item, {"text": text, "taken": taken, "finish_reason": answer[1], "exact_match": int(right)})

        subject.answer(prompts, one)

    def _taken(self, text: str) -> str:
        if self.spec.pattern is None:
            return text
        last = ""
        for found in re.finditer(self.spec.pattern, text):
            last = found[1] if found.re.groups and found[1] is not None else found[0]
        return last

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """Share of right answers."""
        return {"exact_match": metrics.mean([record["exact_match"] for record in records])}

    def value(self, record: Record) -> float:
        """Whether the answer was right."""
        return float(record["exact_match"])


def agreement(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> Metric | None:
    """Share of decisions that two models make alike: likeliest next tokens, choices, or whole answers."""
    for key in ("likeliest", "chosen", "text", "programs"):
        if all(key in record for record in (*ours, *theirs)):
            if key != "likeliest":
                return metrics.mean([float(a[key] == b[key]) for a, b in zip(ours, theirs, strict=True)])
            same = [
                sum(x == y for x, y in zip(a[key], b[key], strict=True))
                for a, b in zip(ours, theirs, strict=True)
            ]
            return metrics.ratio(same, [len(a[key]) for a in ours])
    return None
