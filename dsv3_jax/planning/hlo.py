"""The text of an HLO module: its computations, their instructions, and how often each computation runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_WIDTHS = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computations = dict[str, dict[str, Instruction]]
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*)?\{\s*$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


def computations_of(text: str) -> tuple[Computations, str]:
    """Instructions by name, for every computation by name; and the entry's name."""
    computations: Computations = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            match = _COMPUTATION.match(line)
            if match and not line.startswith("HloModule"):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; expected the HLO of a compiled program")
    return computations, entry


def _instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line).strip()
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    type_text, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _split_closed(rest)
    # An operand is printed with or without its type; its name is the last word of each part.
    names = tuple(part.split()[-1].lstrip("%") for part in _commas(inside) if part.split())
    if opcode == "constant":
        names = (inside,)
    return Instruction(
        name.lstrip("%"), type_text, opcode.strip(), names, attributes, line.startswith("ROOT ")
    )


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    inside, rest = _split_closed(text[1:])
    return f"({inside})", rest.lstrip()


def _split_closed(text: str) -> tuple[str, str]:
    """Text up to the parenthesis that closes it, and what follows."""
    depth = 1
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:at], text[at + 1 :]
    return text, ""


def _commas(text: str) -> Iterator[str]:
    """The parts of a list, split at commas outside of brackets."""
    depth, start = 0, 0
    for at, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def bytes_of(type_text: str) -> int:
    """Bytes of an HLO type, e.g. "bf16[2,8]{1,0}" (32); a tuple is the sum of its parts."""
    total = 0
    for dtype, dims in SHAPE.findall(type_text):
        if dtype in ("token", "opaque"):
            continue
        bits = _WIDTHS[dtype] * 8 if dtype in _WIDTHS else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


# --- how often ------------------------------------------------------------------------------------------------


def times_of(computations: Computations, entry: str) -> dict[str, dict[bool, int]]:
    """How often a step runs each computation: {True: by known trip counts, False: inside a loop of unknown length}."""
    times: dict[str, dict[bool, int]] = {}

    def visit(name: str, runs: int, counted: bool) -> None:
        by_kind = times.setdefault(name, {})
        by_kind[counted] = by_kind.get(counted, 0) + runs
        for one in computations[name].values():
            called = [n for match in _CALLED.findall(one.rest) for n in _names(match)]
            trips = _trip_count(one, computations) if one.opcode == "while" else 1
            for other in called:
                if other in computations:
                    visit(other, runs * (trips or 1), counted and trips is not None)

    visit(entry, 1, True)
    return times


def _names(match: tuple[str, str]) -> list[str]:
    return [match[0]] if match[0] else [name.strip().lstrip("%") for name in match[1].split(",")]


def _trip_count(loop: Instruction, computations: Computations) -> int | None:
    """Trips of a `while`, by the compiler's note or by its condition `i < constant` (how JAX writes a scan)."""
    if match := _TRIPS.search(loop.rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition[1], {}) if condition else {}
    limits = [one for one in body.values() if one.opcode == "constant" and one.type.startswith("s32[]")]
    compares = [one for one in body.values() if one.opcode == "compare"]
    if len(limits) == 1 and len(compares) == 1 and "direction=LT" in compares[0].rest:
        return int(limits[0].operands[0])
    return None
