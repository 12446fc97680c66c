"""A text in windows that predict every token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsv3_jax.evaluation.scoring import Text


def windows(ids: Sequence[int], size: int, first: int) -> Iterator[Text]:
    """Windows of at most `size` read tokens; the last one reads what comes before it, so that it is full too.

    As lm-evaluation-harness cuts them (`lm_eval.utils.get_rolling_token_windows` with a context of one): the first
    window begins with the id `first`, each later one with the last token before it.
    """
    whole = [first, *ids]
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        left = max(0, end - size) if begin else 0
        yield Text(whole[left : end + 1], begin - left + 1)
