"""Which dimension lives on which mesh axis: one table to store weights by, one to compute with.

Storage holds master weights, optimiser state and checkpoints: everything is cut as far as it goes. Compute is
how a layer uses its weights: `fsdp` (and, for dense weights, `expert`) has been gathered, experts stay on their
axis, `tensor` cuts heads and widths. Weights of one dimension (norms, biases) are small and used whole: they are
replicated in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jax.sharding import PartitionSpec

from dsv3_jax.config import LEGEND
from dsv3_jax.errors import ConfigError

QUANTIZED_PARTS = ("codes", "scales", "zeros")  # what a quantised leaf's path goes on with
STACKS = ("dense", "moe", "mtp")  # children of "params" and "router" whose leaves have a leading layer axis


class HasShape(Protocol):
    """A Mesh, an AbstractMesh, or anything else that maps axis names to sizes."""

    @property
    def shape(self) -> Mapping[str, int]: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """Letters that may claim a mesh axis. Rows are tried in order; an axis is used at most once in a leaf.

    Attributes:
      letters: dimension letters; two of them in one leaf are a collision, which is an error.
      axes: the mesh axes a letter of this row is cut over, outermost first.
      where: only in leaves whose path holds this text.
    """

    letters: str
    axes: tuple[str, ...]
    where: str = ""


# "E" counts experts' matrices only below experts/; in the router it is a row of scores that every token needs.
_EXPERTS = Row("E", ("expert",), where="/experts/")
# The indexer's heads (Y) are summed over outside of any product with a weight, and are few: never cut.
_WIDTHS = Row("HIFM", ("tensor",))
# Axes that no mesh has yet: stages of layers, and pieces of a sequence (T is in no weight).
_LATER = (Row("L", ("pipeline",)), Row("T", ("context",)))
STORAGE: tuple[Row, ...] = (
    *_LATER,
    _EXPERTS,
    _WIDTHS,
    # Experts are whole on their device in compute; only master weights and moments are cut further.
    Row("D", ("data", "fsdp"), where="/experts/"),
    # Attention is data-parallel over the expert axis, so dense weights are cut over it as over fsdp.
    Row("D", ("fsdp", "expert")),
    # Leaves without D: the up-projections from the latents.
    Row("A", ("fsdp", "expert")),
    Row("C", ("fsdp", "expert")),
)
COMPUTE: tuple[Row, ...] = (*_LATER, _EXPERTS, _WIDTHS)


def axes_of(path: str, leaf: Any) -> tuple[str, ...]:
    """Dimension letters of a leaf, e.g. ("L", "H", "Q", "A") for "params/moe/attention/q_b_HQA"."""
    *parents, name = path.split("/")
    letters = tuple(name.rpartition("_")[2])
    if any(part in STACKS for part in parents):
        letters = ("L", *letters)
    assert set(letters) <= set(LEGEND), f"{path}: {letters} are not all dimension letters"
    assert len(letters) == len(leaf.shape), f"{path}: letters {letters} and shape {leaf.shape}"
    return letters


def spec_by(table: Sequence[Row], path: str, leaf: Any, mesh: HasShape) -> PartitionSpec:
    """The partition of a leaf by a table.

    Args:
      leaf: anything with `.shape`.
      mesh: sizes of the mesh axes; an axis of size 1, or that the mesh lacks, cuts nothing and is left out.
    Raises:
      ConfigError: a dimension is not divisible by its axes, or two letters of one row collide.
    """
    if path.rpartition("/")[2] in QUANTIZED_PARTS:
        return _quantized_spec(path, leaf, mesh)
    letters = axes_of(path, leaf)
    sizes = {axis: size for axis, size in dict(mesh.shape).items() if size > 1}
    assigned: dict[str, tuple[str, ...]] = {}
    if len([letter for letter in letters if letter != "L"]) > 1:
        used: set[str] = set()
        for row in table:
            axes = tuple(axis for axis in row.axes if axis in sizes and axis not in used)
            claims = [letter for letter in letters if letter in row.letters and row.where in path]
            if not axes or not claims:
                continue
            if len(claims) > 1:
                both = " and ".join(f"{letter} ({LEGEND[letter]})" for letter in claims)
                raise ConfigError(f"{path}: {both} both claim the mesh axes {', '.join(axes)}")
            assigned[claims[0]] = axes
            used.update(axes)
    for letter, size in zip(letters, leaf.shape, strict=True):
        parts = 1
        for axis in assigned.get(letter, ()):
            parts *= sizes[axis]
        if size % parts:
            raise ConfigError(
                f"{path}: {letter} ({LEGEND[letter]}) is {size}, which is not divisible by the mesh axes "
                f"{', '.join(f'{axis} = {sizes[axis]}' for axis in assigned[letter])}"
            )
    entries = [assigned.get(letter, ()) for letter in letters]
    while entries and not entries[-1]:
        entries.pop()
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries))


def _quantized_spec(path: str, leaf: Any, mesh: HasShape) -> PartitionSpec:
    """Codes are never cut within a matrix: experts are on their device, everything else is on every device."""
    parts = dict(mesh.shape).get("expert", 1)
    if "/experts/" not in path or parts == 1:
        return PartitionSpec()
    before = [None] if any(part in STACKS for part in path.split("/")) else []
    if leaf.shape[len(before)] % parts:
        raise ConfigError(
            f"{path}: {leaf.shape[len(before)]} experts are not divisible by the mesh axis expert = {parts}"
        )
    return PartitionSpec(*before, "expert")


def storage_spec(path: str, leaf: Any, mesh: HasShape) -> PartitionSpec:
    """Where a leaf is stored: weights, optimiser moments, checkpoints. Raises ConfigError as `spec_by` does."""
    return spec_by(STORAGE, path, leaf, mesh)


def compute_spec(path: str, leaf: Any, mesh: HasShape) -> PartitionSpec:
    """How a leaf is laid out where a layer uses it. Raises ConfigError as `spec_by` does."""
    return spec_by(COMPUTE, path, leaf, mesh)
