"""Charts of lines over steps as inline SVG. Colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 26, 12, 34
_MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line: values over steps; `color` 1 to 4 of the page's palette. faint: drawn thin, without a legend entry."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 1
    faint: bool = False
    dots: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    log: bool = False,
    zero: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """An SVG of lines with axes, grid and legend; values that are not finite leave a gap.

    Args:
      log: logarithmic values (those above 0).
      zero: the value axis begins at 0.
      width, height: in the page's pixels at its full width, so that all charts have one size of text.
    """
    kept = [one for one in (_finite(one, log) for one in series) if len(one.steps)]
    if not kept:
        return '<p class="none">nothing recorded</p>'
    x_low, x_high = min(one.steps[0] for one in kept), max(one.steps[-1] for one in kept)
    kept = [_thinned(one) for one in kept]
    values = np.concatenate([np.asarray(one.values) for one in kept])
    y_low, y_high = _range(values, log, zero)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1

    def x_of(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (width - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        at = math.log10(value) if log else value
        return height - _BOTTOM - (at - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    ticks = _log_ticks(y_low, y_high) if log else nice_ticks(y_low, y_high, 5)
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in nice_ticks(x_low, x_high, 6):
        if tick == int(tick):
            parts.append(
                f'<text class="tick" x="{x_of(tick):.1f}" y="{height - _BOTTOM + 17}" text-anchor="middle">'
                f"{int(tick):,}</text>"
            )
    parts.append(f'<text class="tick" x="{width - _RIGHT}" y="{height - 3}" text-anchor="end">step</text>')
    for one in kept:
        points = [(x_of(s), y_of(v)) for s, v in zip(one.steps, one.values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = "line faint" if one.faint else "line"
        if len(points) > 1:
            parts.append(f'<polyline class="{kind} c{one.color}" points="{line}"/>')
        if one.dots or len(points) == 1:
            for (x, y), step, value in zip(points, one.steps, one.values, strict=True):
                parts.append(
                    f'<circle class="dot c{one.color}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{escape(one.name)} at step {step:,.0f}: {number(value)}</title></circle>"
                )
    parts.append("</svg>")
    named = [f'<span><i class="c{one.color}"></i>{escape(one.name)}</span>' for one in kept if not one.faint]
    return "".join(parts) + (f'<p class="legend">{"".join(named)}</p>' if len(named) > 1 else "")


def _finite(one: Series, log: bool) -> Series:
    pairs = [
        (step, value)
        for step, value in zip(one.steps, one.values, strict=True)
        if value is not None and math.isfinite(value) and (value > 0 or not log)
    ]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return Series(one.name, steps, values, one.color, one.faint, one.dots)


def _thinned(one: Series) -> Series:
    """At most `_MAX_POINTS` points, each the mean of its neighbours."""
    n = len(one.steps)
    if n <= _MAX_POINTS:
        return one
    edges = np.linspace(0, n, _MAX_POINTS + 1).astype(int)
    at_S, of_S = np.asarray(one.steps, float), np.asarray(one.values, float)
    blocks = [slice(a, b) for a, b in pairwise(edges)]
    steps, values = [at_S[block].mean() for block in blocks], [of_S[block].mean() for block in blocks]
    return Series(one.name, steps, values, one.color, one.faint, one.dots)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values in a window around each place (smaller at the ends)."""
    array = np.asarray([np.nan if value is None else value for value in values], float)
    good = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    at = np.arange(len(array))
    half = np.minimum(np.minimum(at, len(array) - 1 - at), window // 2)
    first, last = at - half, at + half + 1
    number_of = counts[last] - counts[first]
    return list(np.where(number_of > 0, (sums[last] - sums[first]) / np.maximum(number_of, 1), np.nan))


def _range(values: np.ndarray, log: bool, zero: bool) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    if log:
        low, high = math.log10(low), math.log10(high)
    if zero:
        low = min(low, 0.0)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0.0 else low - pad), high + pad


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between where there is room. low, high: exponents."""
    ticks = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5) if high - low < 3 else (1,):
            value = factor * 10.0**exponent
            if low <= math.log10(value) <= high:
                ticks.append(value)
    return ticks


def number(value: float) -> str:
    """A short form: 12,300 or 0.031 or 3.0e-4."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size < 10 else f"{value:.1f}".removesuffix(".0")
