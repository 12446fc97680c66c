"""Which leaves get a pair: kinds of weights, PEFT's module names, or shell patterns of leaf paths.

attention dense shared experts all-linear    kinds; all-linear is all four
q_a_proj kv_b_proj o_proj down_proj ...      names of Hugging Face modules, wherever they occur but in the experts
params/moe/attention/* *_proj_DX ...         patterns of leaf paths
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import rule_for
from dsv3_jax.model.adapted import RANK
from dsv3_jax.quantization.choose import kind_of_leaf

KINDS = ("attention", "dense", "shared", "experts")
ALL = "all-linear"
DEFAULT_TARGETS = ("attention",)


class Letters(NamedTuple):
    """How a pair's letters follow from its leaf's.

    lead: letters (E, P) that count matrices; inputs: letters of a matrix's columns; a, b: the pair's letters.
    """

    lead: int
    inputs: int
    a: str
    b: str


def letters_of(path: str) -> Letters:
    """The letters of a leaf's pair, e.g. (0, 2, "OHU", "DO") for "params/moe/attention/o_DHU"."""
    rule = rule_for(path)
    own = path.rpartition("_")[2]
    lead = len(rule.index_letters.replace("L", ""))
    _, columns = re.findall(r"\([^)]*\)|\w", rule.pattern.partition("->")[0])
    inputs = len(re.findall(r"\w", columns))
    end = len(own) - inputs
    return Letters(lead, inputs, own[:lead] + RANK + own[end:], own[:end] + RANK)


def module_names(path: str) -> tuple[str, ...]:
    """The last word of the Hugging Face modules that a leaf stacks: ("q_a_proj",), ("gate_proj", "up_proj")."""
    word = rule_for(path).name.removesuffix(".weight").rpartition(".")[2]
    return tuple(word.format(P=part) for part in ("gate", "up")) if "{P}" in word else (word,)


def adaptable(paths: Iterable[str]) -> list[str]:
    """The leaves that may get a pair: attention and feed-forward matrices, and the multi-token module's projection."""
    return [path for path in paths if kind_of_leaf(path) in KINDS or path == "params/mtp/proj_DX"]


def chosen_targets(paths: Iterable[str], targets: Sequence[str] = DEFAULT_TARGETS) -> list[str]:
    """The leaves that get a pair, in order.

    A choice is per leaf, that is for all layers of a stack, all experts, and gate and up together.

    Args:
      paths: all leaves of the model.
      targets: kinds, module names or patterns, see above.
    Raises:
      ConfigError: no target, one that matches nothing (the message lists what there is), or one half of gate and up.
    """
    able = adaptable(paths)
    names = {path: module_names(path) for path in able}
    known = sorted({name for path in able if kind_of_leaf(path) != "experts" for name in names[path]})
    chosen: set[str] = set()
    for target in targets:
        if target == ALL:
            found = [path for path in able if kind_of_leaf(path) in KINDS]
        elif target in KINDS:
            found = [path for path in able if kind_of_leaf(path) == target]
        elif "/" in target or "*" in target:
            found = [path for path in able if fnmatch.fnmatchcase(path, target)]
        else:
            found = [path for path in able if target in names[path] and kind_of_leaf(path) != "experts"]
        if not found:
            raise ConfigError(
                f"LoRA target {target!r} matches no weight of this model; there are the kinds {', '.join(KINDS)} and "
                f"{ALL}, the modules {', '.join(known)}, and patterns of leaves such as {able[0] if able else '-'}"
            )
        chosen |= set(found)
    for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
        if one in targets and other not in targets:
            raise ConfigError(f"LoRA target {one!r} without {other!r}: the two are one leaf; name both")
    if not chosen:
        raise ConfigError("LoRA without targets; expected at least one")
    return [path for path in able if path in chosen]
