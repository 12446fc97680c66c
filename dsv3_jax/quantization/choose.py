"""Which leaves are quantised: kinds of weights by name, and what stays as it is.

Norms, biases, the router, the embedding and the indexer's small matrices always stay; the head does unless it is
asked for. A choice is made per leaf, that is for all layers of a stack.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from dsv3_jax.errors import ConfigError

KINDS = {
    "experts": r"/mlp/experts/(gate_up_EPFD|down_EDF)$",
    "shared": r"/mlp/shared/(gate_up_PMD|down_DM)$",
    "dense": r"/mlp/(gate_up_PID|down_DI)$",
    "attention": r"/attention/(q_HQD|q_a_AD|q_b_HQA|kv_a_JD|kv_b_HWC|o_DHU)$",
    "head": r"^params/head_VD$",
}
DEFAULT_KINDS = ("experts", "shared", "dense", "attention")
"""What DeepSeek releases in FP8."""


def kind_of_leaf(path: str) -> str | None:
    """The kind of a leaf, or None for one that is never quantised."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, path)), None)


def chosen_leaves(
    paths: Iterable[str], kinds: Sequence[str] = DEFAULT_KINDS, skip: Sequence[str] = ()
) -> list[str]:
    """The leaves to quantise, in order.

    Args:
      kinds: of KINDS.
      skip: shell patterns of whole leaf paths, such as "params/moe/attention/*" or "*kv_b*".
    Raises:
      ConfigError: an unknown kind, or a pattern that matches no leaf.
    """
    paths = list(paths)
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"kind {kind!r}; expected some of {', '.join(KINDS)}")
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(f"--skip {pattern!r} matches no leaf; leaves are named like {paths[-1]}")
    return [
        path
        for path in paths
        if kind_of_leaf(path) in kinds and not any(fnmatch.fnmatchcase(path, pattern) for pattern in skip)
    ]
