"""Compare two checkpoints on a text: what a quantisation (or a cast) costs in quality.

    python -m convert.compare REFERENCE OTHER --text FILE [--tokens 16384] [--window 512] [--json-output OUT]

Both run as they are stored, quantised weights as codes. Printed for the text's tokens, in windows (which should be no
longer than those of training): perplexity of each and their ratio, Kullback-Leibler divergence KL(reference || other)
in nats a token (mean, median and 99th percentile), the share of positions where both would choose the same next token,
and standard errors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional

from convert.calibrate import read_tokens
from convert.common import command, tell
from dsv3_jax.checkpoint.atomic import make_parent
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.model import Transformer, abstract_variables

_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of another model against `reference`, over `tokens` predicted tokens in `windows`.

    `..._error` are standard errors over windows drawn again with replacement (bootstrap), the same windows for both
    models: a difference of two of them or less says nothing.
    """

    tokens: int
    windows: int
    perplexity_reference: float
    perplexity_other: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p99: float
    greedy_agreement: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"tokens            {self.tokens:,} in {self.windows:,} windows",
            f"perplexity        {self.perplexity_reference:.4f} -> {self.perplexity_other:.4f} "
            f"({100 * (self.perplexity_ratio - 1):+.3f} %, standard error {100 * self.perplexity_ratio_error:.3f})",
            f"KL, nats a token  mean {self.kl_mean:.3e} (standard error {self.kl_error:.1e}), "
            f"median {self.kl_median:.3e}, p99 {self.kl_p99:.3e}",
            f"greedy agreement  {100 * self.greedy_agreement:.2f} %",
        ]


class Reference:
    """A model over windows of tokens, that others are compared with.

    Args:
      keep: hold its log-probabilities (tokens x vocabulary, float32), for more than one comparison.
    """

    def __init__(self, cfg: Any, variables: Any, tokens_BT: np.ndarray, *, keep: bool = False) -> None:
        self._cfg, self._variables, self._tokens_BT = _main_model(cfg), variables, tokens_BT
        self._kept: dict[int, np.ndarray] | None = {} if keep else None

    def quality(self, cfg: Any, variables: Any) -> Quality:
        """Another model of the same vocabulary. Raises DataError for logits that are not finite."""
        return self.measured(*self.tokens(cfg, variables))

    def tokens(self, cfg: Any, variables: Any) -> tuple[np.ndarray, ...]:
        """[windows, tokens] of each predicted token: both negative log-likelihoods, KL, whether both choose alike."""
        cfg, found = _main_model(cfg), []
        for start in range(0, len(self._tokens_BT), _ROWS):
            rows = jnp.asarray(self._tokens_BT[start : start + _ROWS])
            log_q = _log_probabilities(cfg, variables, rows)
            found.append(jax.device_get(_measure(self._log_p(start, rows), log_q, rows[:, 1:])))
        per_token = tuple(np.concatenate(x).astype(float) for x in zip(*found, strict=True))
        if not all(np.isfinite(x).all() for x in per_token):
            raise DataError("the logits are not finite")
        return per_token

    @staticmethod
    def measured(
        nll_p_BT: np.ndarray, nll_q_BT: np.ndarray, kl_BT: np.ndarray, same_BT: np.ndarray
    ) -> Quality:
        """What `tokens` come to."""
        change = nll_q_BT - nll_p_BT
        ratio = math.exp(change.mean())
        return Quality(
            tokens=kl_BT.size,
            windows=len(kl_BT),
            perplexity_reference=math.exp(nll_p_BT.mean()),
            perplexity_other=math.exp(nll_q_BT.mean()),
            perplexity_ratio=ratio,
            perplexity_ratio_error=ratio * bootstrap_error(change.mean(1)),
            kl_mean=float(kl_BT.mean()),
            kl_error=bootstrap_error(kl_BT.mean(1)),
            kl_median=float(np.median(kl_BT)),
            kl_p99=float(np.quantile(kl_BT, 0.99)),
            greedy_agreement=float(same_BT.mean()),
        )

    def _log_p(self, start: int, rows: jax.Array) -> jax.Array | np.ndarray:
        if self._kept is not None and start in self._kept:
            return self._kept[start]
        log_p = _log_probabilities(self._cfg, self._variables, rows)
        if self._kept is not None:
            self._kept[start] = np.asarray(log_p)
        return log_p


def bootstrap_error(values_B: np.ndarray, draws: int = 2000) -> float:
    """Standard error of the mean of values by drawing them again with replacement; the draws are always the same."""
    chosen = np.random.default_rng(0).integers(0, len(values_B), (draws, len(values_B)))
    return float(values_B[chosen].mean(1).std())


def compare(reference: Source, other: Source, tokens_BT: np.ndarray) -> Quality:
    """Run both, as they are stored, over windows of tokens.

    Raises:
      ConfigError: the vocabularies differ.
      DataError: logits that are not finite.
    """
    if reference.cfg.vocab_size != other.cfg.vocab_size:
        raise ConfigError(
            f"vocabularies of {reference.cfg.vocab_size} and {other.cfg.vocab_size} tokens cannot be compared"
        )
    first = Reference(reference.cfg, reference.load(formats=reference.formats), tokens_BT)
    return first.quality(other.cfg, other.load(formats=other.formats))


def _main_model(cfg: Any) -> Any:
    return dataclasses.replace(
        cfg, dtype="float32", num_nextn_predict_layers=0, mtp_own_embedding=False, mtp_own_head=False
    )


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(cfg: Any, variables: Any, tokens_BT: jax.Array) -> jax.Array:
    model = Transformer(cfg)
    output: Any = model.apply(variables, tokens_BT)
    logits: Any = model.apply(variables, output.hidden_BTD, method="logits")
    return jax.nn.log_softmax(logits, axis=-1)


@jax.jit
def _measure(log_p: jax.Array, log_q: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Per predicted token: negative log-likelihoods, KL, and whether the likeliest token is the same."""
    log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    nll = [-jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (log_p, log_q)]
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return (*nll, kl, jnp.argmax(log_p, -1) == jnp.argmax(log_q, -1))


def main(
    reference: Positional[Path],
    other: Positional[Path],
    text: Path,
    tokens: int = 16384,
    window: int = 512,
    json_output: Path | None = None,
) -> None:
    """Compare two checkpoints on a text.

    Args:
      reference: native checkpoint, training run, or Hugging Face folder.
      other: the same model, quantised or cast.
      text: UTF-8 text that neither was trained or calibrated on.
      tokens: how many of its tokens are used.
      window: tokens that are read in one go, at most.
      json_output: also write the figures here.
    """
    if json_output is not None:  # told before the work, not after it
        if json_output.is_dir():
            raise ConfigError(f"--json-output {json_output} is a folder; expected a file")
        make_parent(json_output)
    first, second = (open_source(folder, abstract_variables) for folder in (reference, other))
    tell([*first.notes, *second.notes])
    quality = compare(first, second, read_tokens(first, text, tokens, window, "--text"))
    print("\n".join(quality.lines()))
    if json_output is not None:
        json_output.write_text(json.dumps(dataclasses.asdict(quality), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command("compare", main)
