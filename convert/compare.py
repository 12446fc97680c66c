"""Compare two checkpoints on a text: what a quantisation (or a cast) costs in quality.

    python -m convert.compare REFERENCE OTHER --text FILE [--tokens 16384] [--json-output OUT]

Both run as they are stored, quantised weights as codes. Printed for the text's tokens, in windows of at most 512:
perplexity of each and their ratio, Kullback-Leibler divergence KL(reference || other) in nats a token (mean, median and
99th percentile), and the share of positions where both would choose the same next token.
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
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.model import Transformer, abstract_variables

_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of `other` against `reference`, over `tokens` predicted tokens."""

    tokens: int
    perplexity_reference: float
    perplexity_other: float
    perplexity_ratio: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    greedy_agreement: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"tokens            {self.tokens:,}",
            f"perplexity        {self.perplexity_reference:.4f} -> {self.perplexity_other:.4f} "
            f"({100 * (self.perplexity_ratio - 1):+.3f} %)",
            f"KL, nats a token  mean {self.kl_mean:.3e}, median {self.kl_median:.3e}, p99 {self.kl_p99:.3e}",
            f"greedy agreement  {100 * self.greedy_agreement:.2f} %",
        ]


def compare(reference: Source, other: Source, tokens_BT: np.ndarray) -> Quality:
    """Run both over windows of tokens.

    Raises:
      ConfigError: the vocabularies differ.
      DataError: logits that are not finite.
    """
    if reference.cfg.vocab_size != other.cfg.vocab_size:
        raise ConfigError(
            f"vocabularies of {reference.cfg.vocab_size} and {other.cfg.vocab_size} tokens cannot be compared"
        )
    models = [(_main_model(source.cfg), source.load(formats=source.formats)) for source in (reference, other)]
    nll: list[list[np.ndarray]] = [[], []]
    kl, same = [], []
    for start in range(0, len(tokens_BT), _ROWS):
        rows = jnp.asarray(tokens_BT[start : start + _ROWS])
        log_p, log_q = (_log_probabilities(cfg, variables, rows) for cfg, variables in models)
        found = jax.device_get(_measure(log_p, log_q, rows[:, 1:]))
        for sums, values in zip(nll, found[:2], strict=True):
            sums.append(values.ravel())
        kl.append(found[2].ravel())
        same.append(found[3].ravel())
    means = [float(np.concatenate(values).mean()) for values in nll]
    divergence = np.concatenate(kl).astype(float)
    if not all(map(math.isfinite, [*means, float(divergence.sum())])):
        raise DataError("the logits are not finite")
    return Quality(
        tokens=divergence.size,
        perplexity_reference=math.exp(means[0]),
        perplexity_other=math.exp(means[1]),
        perplexity_ratio=math.exp(means[1] - means[0]),
        kl_mean=float(divergence.mean()),
        kl_median=float(np.median(divergence)),
        kl_p99=float(np.quantile(divergence, 0.99)),
        greedy_agreement=float(np.concatenate(same).mean()),
    )


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
    json_output: Path | None = None,
) -> None:
    """Compare two checkpoints on a text.

    Args:
      reference: native checkpoint, training run, or Hugging Face folder.
      other: the same model, quantised or cast.
      text: UTF-8 text that neither was trained or calibrated on.
      tokens: how many of its tokens are used.
      json_output: also write the figures here.
    """
    first, second = (open_source(folder, abstract_variables) for folder in (reference, other))
    tell([*first.notes, *second.notes])
    quality = compare(first, second, read_tokens(first, text, tokens, "--text", "--tokens"))
    print("\n".join(quality.lines()))
    if json_output is not None:
        json_output.write_text(json.dumps(dataclasses.asdict(quality), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command("compare", main)
