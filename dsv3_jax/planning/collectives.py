"""Every collective of a compiled program: kind, bytes, group, and how often a step runs it.

Read from the HLO text (`compiled.as_text()`). A collective inside a loop counts as often as the loop runs; loops
inside loops multiply.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from dsv3_jax.planning.hardware import NODE
from dsv3_jax.planning.hlo import SHAPE, Instruction, bytes_of, computations_of, times_of

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      operand_bytes: bytes that each device puts in, once.
      group: devices that take part together.
      times: how often a step runs it; per trip of a loop that is not `counted`.
      per_node: devices of a group in one node of NODE devices.
      counted: False when a loop around it has a trip count that the text does not tell. The step has such loops for
        tokens beyond the usual buffers of the expert exchange: none with even routing.
      where: the name of the JAX operation it comes from.
      dtype: the element type, e.g. "bf16".
      upcast: the program says bfloat16 and XLA:CPU made it float32; `operand_bytes` are those of the program.
    """

    kind: str
    operand_bytes: int
    group: int
    times: int
    per_node: int
    counted: bool
    where: str
    dtype: str
    upcast: bool = False

    @property
    def moved(self) -> int:
        """Bytes a device sends in a step, by a ring (the least that point-to-point links can do).

        all-gather: (n - 1) times the operand. reduce-scatter, all-to-all: (n - 1) / n of it. all-reduce: twice that.
        """
        n = self.group
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        return int(self.operand_bytes * share.get(self.kind, (n - 1) / n)) * self.times

    @property
    def network(self) -> int:
        """Of these, the bytes that leave the node through the device's own adapter.

        A group with p devices in each of m nodes brings every byte into a node once and shares it over NVLink, except
        in exchanges, where every pair of devices has its own bytes.
        """
        n, p = self.group, self.per_node
        if n == p:
            return 0
        if self.kind in ("all-to-all", "ragged-all-to-all"):
            return self.moved * (n - p) // (n - 1)
        if self.kind == "collective-permute":
            return self.moved
        m = n // p
        return int(self.moved * ((m - 1) / m / p) / ((n - 1) / n))


_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})?\}")
# Axes with sizes, perhaps another order of the devices, and the axes of a group.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')


def parse(text: str, devices: int, lowered: str = "") -> list[Collective]:
    """The collectives of an HLO module for `devices` partitions, in the order of the text.

    Args:
      text: the compiled module.
      lowered: the program as it was given to the compiler (`lowered.as_text()`). XLA:CPU widens bfloat16 collectives;
        with this text they count as what they are. A size that occurs in both types counts as float32.
    Raises:
      ValueError: the text holds no ENTRY computation.
    """
    computations, entry = computations_of(text)
    narrow = _narrow(lowered)
    return [
        dataclasses.replace(one, times=runs, counted=counted)
        for name, by_kind in times_of(computations, entry).items()
        for one in _collectives(computations[name], devices, narrow)
        for counted, runs in by_kind.items()
        if runs
    ]


def _collectives(
    instructions: dict[str, Instruction], devices: int, narrow: set[tuple[str, int]]
) -> Iterator[Collective]:
    """Those of one computation, as if it ran once."""
    for one in instructions.values():
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(one.rest, devices)
        operands = [instructions[operand] for operand in one.operands if operand in instructions]
        if kind == "ragged-all-to-all":
            operands = operands[:1]
        size = sum(bytes_of(operand.type) for operand in operands)
        dtypes = sorted({match[0] for operand in operands for match in SHAPE.findall(operand.type)})
        upcast = dtypes == ["f32"] and (kind, size // 4) in narrow
        group = 2 if kind == "collective-permute" else groups.shape[1]
        if group == 1 or not size:
            continue
        op_name = _OP_NAME.search(one.rest)
        yield Collective(
            kind=kind,
            operand_bytes=size // 2 if upcast else size,
            group=group,
            times=1,
            per_node=group // max(len(set(members)) for members in (groups // NODE).tolist()),
            counted=True,
            where=op_name[1] if op_name else one.name,
            dtype="bf16" if upcast else "+".join(dtypes),
            upcast=upcast,
        )


def by_kind(collectives: Iterable[Collective]) -> dict[str, int]:
    """Bytes a device sends in a step, for every kind that occurs; loops of unknown length do not run."""
    totals: dict[str, int] = {}
    for one in collectives:
        if one.counted:
            totals[one.kind] = totals.get(one.kind, 0) + one.moved
    return {kind: totals[kind] for kind in KINDS if kind in totals}


# --- who with whom --------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members] of a collective."""
    if match := _IOTA.search(attributes):
        shape, sizes = _numbers(match[1]), _numbers(match[2])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if match[3]:
            ids = ids.transpose(_numbers(match[3]))
        return ids.reshape(shape)
    if match := _MESH.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        names, over = list(axes), re.findall(r"'(\w+)'", match[4])
        ids = np.arange(math.prod(axes.values()))
        if match[2]:
            ids = ids.reshape(_numbers(match[2]))
        if match[3]:
            ids = ids.transpose(_numbers(match[3]))
        kept = [name for name in names if name not in over]
        ids = ids.reshape(list(axes.values())).transpose([names.index(name) for name in (*kept, *over)])
        return ids.reshape(-1, math.prod(axes[name] for name in over))
    match = _LISTED.search(attributes)
    if match and match[1]:
        return np.asarray(json.loads("[" + match[1].replace("{", "[").replace("}", "]") + "]"))
    if "replica_groups=" in attributes and not match:
        at = attributes.index("replica_groups=")
        raise ValueError(f"groups of devices in an unknown form: {attributes[at : at + 200]}")
    return np.arange(devices)[None]


_LOWERED = re.compile(
    r'"stablehlo\.(all_gather|reduce_scatter|all_reduce|all_to_all|collective_permute)".*?: \((tensor<[^)]*)\) ->',
    re.DOTALL,
)


def _narrow(lowered: str) -> set[tuple[str, int]]:
    """(kind, elements) of the collectives that the program does in bfloat16 and in no other type."""
    seen: dict[tuple[str, int], set[str]] = {}
    for kind, types in _LOWERED.findall(lowered):
        for inside in re.findall(r"tensor<([^>]*)>", types):
            *dims, dtype = inside.split("x")
            seen.setdefault((kind.replace("_", "-"), math.prod(map(int, dims))), set()).add(dtype)
    return {key for key, dtypes in seen.items() if dtypes == {"bf16"}}
