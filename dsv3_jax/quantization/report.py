"""What quantising a checkpoint cost: sizes, and the error of every leaf, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FILE, PLOT = "quantization.json", "quantization.svg"


@dataclasses.dataclass(frozen=True)
class LeafError:
    """One quantised leaf.

    Attributes:
      path, fmt: which, and its format.
      nbytes: bytes of its parts.
      values: number of weights.
      by_layer: relative root-mean-square error |w - w'| / |w| of each layer, in stack order.
    """

    path: str
    fmt: str
    nbytes: int
    values: int
    by_layer: list[float]


@dataclasses.dataclass(frozen=True)
class Report:
    """Sizes in bytes and errors of a quantised checkpoint; `rounding` is "nearest", "gptq" or "awq"."""

    rounding: str
    leaves: list[LeafError]
    nbytes: int
    nbytes_float32: int

    def table(self) -> str:
        """Lines of text."""
        width = max(len(leaf.path) for leaf in self.leaves)
        lines = [f"{'leaf':<{width}}  format    of float32  error (mean, worst layer)"]
        for leaf in self.leaves:
            share = leaf.nbytes / (4 * leaf.values)
            mean = sum(leaf.by_layer) / len(leaf.by_layer)
            lines.append(
                f"{leaf.path:<{width}}  {leaf.fmt:<8}  {share:9.4f}   {mean:8.5f}  {max(leaf.by_layer):8.5f}"
            )
        coded, values = sum(leaf.nbytes for leaf in self.leaves), sum(leaf.values for leaf in self.leaves)
        lines.append(
            f"quantised leaves {coded / 1e6:,.2f} MB ({coded / (4 * values):.4f} of float32), whole checkpoint "
            f"{self.nbytes / 1e6:,.2f} MB ({self.nbytes / self.nbytes_float32:.4f} of float32)"
        )
        return "\n".join(lines)


def measure(
    source: Any, formats: Mapping[str, str], out: Path, rounding: str, calibrated: Any = None
) -> Report:
    """Compare what lies in `out` (a checkpoint without manifest yet) with its source, tensor by tensor.

    Args:
      source: `checkpoint.source.Source` of the weights before.
      formats: format of every quantised leaf.
      calibrated: `convert.calibrate.Calibrated`, which knows what the codes of each tensor stand for.
    """
    from dsv3_jax.checkpoint import layout
    from dsv3_jax.checkpoint.quantized import QuantizedLeaf

    leaves = {path: QuantizedLeaf(out / layout.WEIGHTS, path, fmt) for path, fmt in formats.items()}
    sums: dict[str, dict[int, np.ndarray]] = {path: {} for path in formats}
    sizes: dict[str, list[int]] = {path: [0, 0] for path in formats}
    nbytes = values = 0
    for entry in source.entries if calibrated is None else calibrated.in_order(source.entries):
        before = source.tensors[entry.name]
        values += before.size
        if entry.path not in formats:
            nbytes += before.size * {"F32": 4, "BF16": 2, "F16": 2}[source.leaf_dtypes[entry.path]]
            continue
        after = leaves[entry.path].tensor(entry)
        own = sum(part.nbytes for part in after.parts.values())
        nbytes += own
        sizes[entry.path][0] += own
        sizes[entry.path][1] += before.size
        layer = entry.index[0] if entry.index else 0
        total = sums[entry.path].setdefault(layer, np.zeros(2))
        values_before = before.pieces("F32") if calibrated is None else calibrated.before(entry)
        total += squares(values_before, after.pieces("F32"))
    return Report(
        rounding,
        [
            LeafError(
                path,
                formats[path],
                sizes[path][0],
                sizes[path][1],
                [
                    math.sqrt(error / weight) if weight else 0.0
                    for error, weight in map(tuple, by_layer.values())
                ],
            )
            for path, by_layer in sums.items()
        ],
        nbytes,
        4 * values,
    )


def squares(before: Iterable[np.ndarray], after: Iterable[np.ndarray]) -> np.ndarray:
    """[sum of (a - b)^2, sum of a^2] of two streams of flat float32 pieces, which may be cut differently."""
    total, rest, other = np.zeros(2), np.empty(0, np.float32), iter(after)
    for piece in before:
        while piece.size:
            if not rest.size:
                rest = next(other)
            count = min(piece.size, rest.size)
            a, b = piece[:count].astype(float), rest[:count].astype(float)
            total += [np.dot(a - b, a - b), np.dot(a, a)]
            piece, rest = piece[count:], rest[count:]
    return total


def write_report(report: Report, folder: Path) -> None:
    """quantization.json and quantization.svg in `folder`."""
    (folder / FILE).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    (folder / PLOT).write_text(svg(report), encoding="utf-8")


_STYLE = """
svg { font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; font-size:12px; --text:#1c2126; --soft:#5c6670;
 --grid:#d5d9dd; --page:#ffffff; --bar:#1f6fb8 }
@media (prefers-color-scheme: dark) { svg { --text:#e6e9ec; --soft:#9aa5af; --grid:#3a4148; --page:#14171a;
 --bar:#6ab0ee } }
.page { fill:var(--page) } .title { fill:var(--text); font-size:14px; font-weight:600 } .name { fill:var(--text) }
.soft { fill:var(--soft) } .grid { stroke:var(--grid) } .bar { fill:var(--bar) } .end { text-anchor:end }
.middle { text-anchor:middle }
"""


def svg(report: Report) -> str:
    """A plot of every leaf's relative error over its layers: one row a leaf, one bar a layer, heights from zero."""
    row, tallest, right = 30, 20, 64
    layers = max(len(leaf.by_layer) for leaf in report.leaves)
    worst = max(max(leaf.by_layer) for leaf in report.leaves) or 1.0
    bar = 24 if layers <= 12 else 14
    left = 24 + 7 * max(len(f"{leaf.path.removeprefix('params/')} ({leaf.fmt})") for leaf in report.leaves)
    numbers = left + max(bar * layers, 40) + 2 * right
    width, height = max(numbers + 16, 620), 84 + row * len(report.leaves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<style>{_STYLE}</style><rect class="page" width="100%" height="100%"/>',
        '<text class="title" x="16" y="24">Relative error |w \u2212 w\u2032| / |w| of every leaf by layer</text>',
        f'<text class="soft" x="16" y="44">rounding: {report.rounding}; a bar of full height is {worst:.4f}</text>',
        f'<text class="soft end" x="{numbers - right}" y="64">mean</text>',
        f'<text class="soft end" x="{numbers}" y="64">worst</text>',
    ]
    step = 1 if layers <= 12 else 10
    for layer in range(0, layers, step):
        x = left + bar * layer + (bar - 3) / 2
        parts.append(f'<text class="soft middle" x="{x:g}" y="64">{layer}</text>')
    for i, leaf in enumerate(report.leaves):
        base = 64 + row * (i + 1)
        name = leaf.path.removeprefix("params/")
        parts.append(
            f'<line class="grid" x1="16" x2="{numbers}" y1="{base + 0.5}" y2="{base + 0.5}"/>'
            f'<text class="name" x="16" y="{base - 6}">{name} <tspan class="soft">({leaf.fmt})</tspan></text>'
        )
        for layer, error in enumerate(leaf.by_layer):
            tall = max(1.0, tallest * error / worst)
            parts.append(
                f'<rect class="bar" x="{left + bar * layer}" y="{base - tall:.1f}" width="{bar - 3}" '
                f'height="{tall:.1f}"><title>{name}, layer {layer} of its stack: {error:.5f}</title></rect>'
            )
        mean = sum(leaf.by_layer) / len(leaf.by_layer)
        for x, value in ((numbers - right, mean), (numbers, max(leaf.by_layer))):
            parts.append(f'<text class="name end" x="{x}" y="{base - 6}">{value:.4f}</text>')
    return "\n".join([*parts, "</svg>", ""])
