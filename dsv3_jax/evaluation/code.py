"""Programs: the model writes a function, its tests are run (`sandbox`), pass@k counts."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence

from dsv3_jax.errors import ConfigError
from dsv3_jax.evaluation import metrics
from dsv3_jax.evaluation.prompts import joined
from dsv3_jax.evaluation.records import Record, Row, Spec
from dsv3_jax.evaluation.sandbox import Limits, Program, Verdict, check_sandbox, run_programs
from dsv3_jax.evaluation.subject import Subject
from dsv3_jax.evaluation.tasks import Done, Metrics, Rows, answerable, at_line
from dsv3_jax.inference import Sampling

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function ends: Chen et al. 2021, section 2.1."""

NOT_ALLOWED = (
    "{name} runs programs that the model writes. They run in a sandbox (docs/evaluation.md says what it holds); give "
    "--run-code if you accept that, or leave the task out"
)


@dataclasses.dataclass(frozen=True)
class CodeOptions:
    """How programs are drawn and run; the fields are flags.

    Attributes:
      run_code: whether they may be run at all.
      samples: programs a problem; more than one need a temperature above 0.
    """

    run_code: bool = False
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.samples > 1 and self.temperature == 0):
            raise ConfigError(
                f"--samples is {self.samples} and --temperature {self.temperature:g}; expected 1 or more, and a "
                "temperature above 0 for more than one (greedy programs are all the same)"
            )


class Code(Rows):
    """Records with `prompt`, `entry_point` and `test`: the answer goes on after the prompt up to the function's end."""

    def __init__(self, spec: Spec, rows: Sequence[Row], options: CodeOptions) -> None:
        if not options.run_code:
            raise ConfigError(NOT_ALLOWED.format(name=spec.name))
        if spec.shots:
            raise ConfigError(f"{spec.name}: a code task takes no shots")
        super().__init__(spec, rows)
        self._options = options
        for item in range(len(rows)):
            self._program(item, "")

    def _program(self, item: int, answer: str) -> Program:
        fields = self.fields(item)
        prompt = joined(fields.prompt())
        return Program(prompt + answer, fields.text("entry_point"), fields.text("test"), prompt)

    def run(self, subject: Subject, items: Sequence[int], done: Done) -> None:
        """See `Task`. Programs are run once all are written; a killed run writes them again."""
        self.missing = check_sandbox()
        if self.missing:
            print(
                f"warning: the sandbox is weaker on this machine: {', '.join(self.missing)}", file=sys.stderr
            )
        options, spec = self._options, self.spec
        prompts = []
        for item in items:
            where, prompt = self._rows[item].where, self.fields(item).prompt()
            ids = at_line(where, functools.partial(subject.encoder.prompt, prompt))
            answerable(ids, spec.max_new_tokens, subject.context, where)
            for sample in range(options.samples):
                sampling = Sampling(
                    max_new_tokens=spec.max_new_tokens,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    seed=options.seed + sample,
                    stop=spec.stop or STOP,
                )
                prompts.append((ids, sampling))
        answers = [text for text, _ in subject.answer(prompts)]
        n = options.samples
        programs = [self._program(items[at // n], text) for at, text in enumerate(answers)]
        verdicts: dict[int, Verdict] = {}

        def judged(at: int, verdict: Verdict) -> None:
            verdicts[at] = verdict
            problem = range(at // n * n, at // n * n + n)
            if all(other in verdicts for other in problem):
                found = [verdicts[other] for other in problem]
                done(
                    items[at // n],
                    {
                        "programs": [answers[other] for other in problem],
                        "outcomes": [[one.outcome, one.reason] for one in found],
                        "passed": sum(one.passed for one in found),
                        "samples": n,
                    },
                )

        run_programs(programs, options.limits, judged)

    def metrics(self, records: Sequence[Record]) -> Metrics:
        """pass@k for k of 1, 10 and 100 up to the samples; the error is over problems."""
        n = self._options.samples
        return {
            f"pass@{k}": metrics.mean([metrics.pass_at_k(n, record["passed"], k) for record in records])
            for k in (1, 10, 100)
            if k <= n
        }

    def value(self, record: Record) -> float:
        """pass@1."""
        return record["passed"] / record["samples"]
