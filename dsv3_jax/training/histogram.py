"""A histogram as inline SVG, in the manner of `dsv3_jax.training.charts`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv3_jax.training.charts import HEIGHT, WIDTH, nice_ticks, number

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 12, 34


def histogram(values: Sequence[float], unit: str, *, bins: int = 40) -> str:
    """Bars of how often each value occurs, over the central 99 % of them; the others are counted in the caption.

    Args:
      unit: named at the end of the axis.
    """
    array = np.asarray([value for value in values if value is not None and np.isfinite(value)], float)
    if not len(array):
        return '<p class="none">nothing recorded</p>'
    low, high = np.quantile(array, [0.0, 0.99])
    if low == high:
        low, high = low * 0.9 - 1e-9, high * 1.1 + 1e-9
    shown = array[array <= high]
    counts, edges = np.histogram(shown, bins=min(bins, max(len(shown) // 4, 1)), range=(low, high))
    tallest = max(int(counts.max()), 1)

    def x_of(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y_of(count: float) -> float:
        return HEIGHT - _BOTTOM - count / tallest * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in nice_ticks(0.0, float(tallest), 4):
        if tick != int(tick):
            continue
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        left, right, top = x_of(start), x_of(stop), y_of(count)
        parts.append(
            f'<rect class="bar c1" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'height="{HEIGHT - _BOTTOM - top:.1f}"><title>{number(start)} to {number(stop)} {unit}: '
            f"{int(count):,}</title></rect>"
        )
    for tick in nice_ticks(float(low), float(high), 6):
        parts.append(
            f'<text class="tick" x="{x_of(tick):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
            f"{number(tick)}</text>"
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{unit}</text></svg>'
    )
    beyond = len(array) - len(shown)
    if beyond:
        parts.append(
            f'<p class="legend">{beyond:,} of {len(array):,} above {number(float(high))} {unit}, '
            f"the longest {number(float(array.max()))}</p>"
        )
    return "".join(parts)
