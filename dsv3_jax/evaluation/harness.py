"""lm-evaluation-harness with our models: its model class `dsv3_jax`, and its command line with the class registered.

python -m dsv3_jax.evaluation.harness run --model dsv3_jax --model_args checkpoint=runs/demo --tasks FILE.yaml

Importing this needs the `eval` extra. Token ids, windows and beginnings are those of `python -m dsv3_jax.evaluation`
(`TextEncoder`, `windows`), so both give the same figures.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import parse_kernels
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.evaluation.prompts import text_prompt
from dsv3_jax.evaluation.scoring import Score, Text
from dsv3_jax.evaluation.subject import Model
from dsv3_jax.evaluation.windows import windows
from dsv3_jax.inference import Sampling
from dsv3_jax.inference.batch import Job

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    raise ConfigError(
        f"lm-evaluation-harness is not installed ({error.name} is missing): install the `eval` extra "
        "(./run setup --extras eval)"
    ) from None

_LOG = logging.getLogger(__name__)


@register_model("dsv3_jax")
class HarnessModel(LM):
    """A checkpoint as the harness's model; the arguments are those of `--model_args`."""

    def __init__(
        self,
        checkpoint: str,
        quantize: str | None = None,
        adapter: str | None = None,
        mesh: str | None = None,
        dtype: Any = None,
        kernels: str = "auto",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """
        Args:
          max_length: tokens read at most; by default the model's context.
          batch_size: 16 where the harness gives none, or "auto".
          max_batch_size, device: the harness's; JAX chooses the device.
        """
        super().__init__()
        batch = 16 if batch_size in (None, "auto") else int(str(batch_size))
        job = Job(
            Path(checkpoint),
            Sampling(),
            batch_size=batch,
            dtype=dtype,
            kernels=parse_kernels(kernels),
            quantize=quantize,
            mesh=mesh,
            adapter=None if adapter is None else Path(adapter),
        )
        self._subject = Model(job, job.open())
        self._length = min(max_length or self._subject.context, self._subject.context)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would write it) of each (context, continuation)."""
        texts = [self._pair(*request.args) for request in requests]
        found = self._subject.score(texts)
        return [(score.total, _greedy(text, score)) for text, score in zip(texts, found, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, every token once."""
        first, texts, whose = self._subject.encoder.first, [], []
        if first is None:
            raise ConfigError("the model has no id that a text could begin with")
        for at, request in enumerate(requests):
            for window in windows(self._subject.encoder.text(request.args[0]), self._length, first):
                texts.append(window)
                whose.append(at)
        totals = [0.0] * len(requests)
        for at, score in zip(whose, self._subject.score(texts), strict=True):
            totals[at] += score.total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its stop strings, which is left out."""
        prompts = []
        for request in requests:
            context, options = request.args
            new = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))
            until = options.get("until") or ()
            until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
            sampled = bool(options.get("do_sample")) and float(options.get("temperature", 1.0)) > 0
            sampling = Sampling(
                max_new_tokens=new,
                temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
                top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
                stop=until,
            )
            ids = self._subject.encoder.prompt(text_prompt(context))
            room = self._length - new
            if room < 1:
                raise ConfigError(f"max_gen_toks is {new}; the context has {self._length} tokens")
            if len(ids) > room:
                _LOG.warning("a context of %d tokens is cut on the left to %d", len(ids), room)
                ids = ids[-room:]
            prompts.append((ids, sampling))
        return [text for text, _ in self._subject.answer(prompts)]

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Refused: a template's text would have to spell control tokens, which text may not."""
        raise ConfigError(
            "--apply_chat_template is not supported; python -m dsv3_jax.evaluation --chat renders turns as ids"
        )

    def _pair(self, context: str, continuation: str) -> Text:
        ids, before = self._subject.encoder.pair(text_prompt(context), continuation)
        cut = max(0, len(ids) - 1 - self._length)
        if cut >= before:
            raise ConfigError(
                f"a continuation of {len(ids) - before} tokens is more than the context of {self._length}"
            )
        if cut:
            _LOG.warning("a text of %d tokens is cut on the left to %d", len(ids), len(ids) - cut)
        return Text(ids[cut:], before - cut)


def _greedy(text: Text, score: Score) -> bool:
    return [int(i) for i in text.ids[text.start :]] == [int(i) for i in score.likeliest]


def main() -> None:
    """The harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.modules.setdefault(
        "dsv3_jax.evaluation.harness", sys.modules["__main__"]
    )  # one class, registered once
    run_main(main)
