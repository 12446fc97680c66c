"""Which leaves are quantised: kinds of weights by name, and what stays as it is.

Norms, biases, the router, the embedding and the indexer's small matrices always stay; the head does unless it is
asked for. A choice is made per leaf, that is for all layers of a stack.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from dsv3_jax.errors import ConfigError
from dsv3_jax.quantization.formats import Format, parse_format

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


def choose_formats(
    columns: Mapping[str, int],
    stored: Mapping[str, str],
    fmt: Format,
    kinds: Sequence[str] = DEFAULT_KINDS,
    skip: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """The format of every leaf that is to be quantised, and notes for the user.

    Args:
      columns: leaf path -> columns of its matrices, all leaves.
      stored: formats of the leaves that are quantised already; those that are not chosen stay as they are.
      fmt: the format; where its groups do not divide the columns, smaller ones that do. One that only adds 8-bit
        activations to what is stored keeps the stored codes.
    Raises:
      ConfigError: as `chosen_leaves`, or no leaf is left.
    """
    formats, notes = dict(stored), []
    twice: dict[str, int] = {}
    for path in chosen_leaves(columns, kinds, skip):
        coded = parse_format(stored[path]) if path in stored else None
        if coded is not None and fmt.activations != "none" and coded.kind == fmt.kind:
            formats[path] = str(dataclasses.replace(coded, activations=fmt.activations))
            continue
        own = fmt.fitting(columns[path])
        if own is None:
            notes.append(f"{path}: no group of 16 or more divides its {columns[path]} columns: left as it is")
            continue
        if own != fmt:
            notes.append(f"{path}: groups of {own.group}, which divide its {columns[path]} columns")
        formats[path] = str(own)
        if coded is not None and coded != own:
            twice[stored[path]] = twice.get(stored[path], 0) + 1
    if not formats:
        raise ConfigError("no leaf is left to quantise")
    notes += [
        f"{count} leaves are stored as {name} and rounded a second time" for name, count in twice.items()
    ]
    return formats, notes
