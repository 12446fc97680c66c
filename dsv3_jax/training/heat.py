"""The expert load as a heat map, and over time under a slider. Nothing is loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import numpy as np

from dsv3_jax.training.charts import WIDTH

_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of load over mean, 0 to 2
_MOST = 400_000  # cells of all frames together, one character each

_SCRIPT = """
(card => {
  const data = JSON.parse(card.querySelector('script[type="application/json"]').textContent);
  const cells = [...card.querySelectorAll('rect.load')], texts = [...card.querySelectorAll('text.cell')];
  const slider = card.querySelector('input'), label = card.querySelector('output');
  slider.addEventListener('input', () => {
    const frame = data.frames[slider.value];
    label.textContent = frame.name;
    cells.forEach((cell, at) => {
      const level = parseInt(frame.loads[at], 36);
      const ratio = (2 * level / 35).toFixed(2) + (level == 35 ? ' or more' : '');
      cell.setAttribute('fill', data.colors[level]);
      const title = cell.firstElementChild;
      title.textContent = title.textContent.replace(/: .*/, ': ' + ratio + ' x mean');
      if (texts.length) texts[at].textContent = (2 * level / 35).toFixed(1);
    });
  });
})(document.currentScript.parentElement);
"""


def heat_over_time(frames: Sequence[tuple[str, np.ndarray]], names: Sequence[str]) -> str:
    """A heat map of the last frame and, where there are several, a slider over all of them.

    Args:
      frames: what it is called, e.g. "steps 1 to 20", and the tokens of each expert, layers by experts.
      names: of the rows.
    """
    chart = heat_map(frames[-1][1], names)
    if len(frames) < 2:
        return chart
    shown = [{"name": name, "loads": _levels(load_LE)} for name, load_LE in frames]
    colors = [_heat(2 * level / (len(_LEVELS) - 1)) for level in range(len(_LEVELS))]
    last = len(frames) - 1
    # "<" cannot occur: numbers, step ranges and colours alone.
    return (
        f'<label class="slider"><input type="range" min="0" max="{last}" value="{last}" aria-label="time">'
        f"<output>{escape(frames[-1][0])}</output></label>{chart}"
        f'<script type="application/json">{json.dumps({"colors": colors, "frames": shown})}</script>'
        f"<script>{_SCRIPT}</script>"
    )


def frame_count(L: int, E: int, steps: int) -> int:
    """How many frames a page carries: at most 24, fewer where layers by experts are many, at least 4 steps each."""
    return max(1, min(24, _MOST // (L * E), steps // 4))


def _levels(load_LE: np.ndarray) -> str:
    ratio_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    level_LE = np.rint(np.clip(ratio_LE, 0.0, 2.0) / 2.0 * (len(_LEVELS) - 1)).astype(int)
    return "".join(_LEVELS[level] for level in level_LE.ravel())


def heat_map(load_LE: np.ndarray, names: Sequence[str]) -> str:
    """Layers by experts; colour is load over the layer's mean, 1 neutral, 0 blue, 2 and more red.

    Args:
      load_LE: tokens (or a mean of them) each expert got.
      names: of the rows.
    """
    L, E = load_LE.shape
    ratio_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    left, top, bottom = 66, 4, 40
    cell = (2 * WIDTH - left - 12) / E
    tall = max(min(cell, 26.0), 10.0)
    height = top + L * tall + bottom
    parts = [f'<svg viewBox="0 0 {2 * WIDTH} {height:.0f}" role="img" class="heat">']
    gap = 1.0 if cell > 6 else 0.0
    for row in range(L):
        y = top + row * tall
        name = escape(names[row])
        parts.append(
            f'<text class="tick" x="{left - 7}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{name}</text>'
        )
        for expert in range(E):
            ratio = float(ratio_LE[row, expert])
            parts.append(
                f'<rect class="load" x="{left + expert * cell:.2f}" y="{y:.2f}" '
                f'width="{cell - gap:.2f}" height="{tall - gap:.2f}" '
                f'fill="{_heat(ratio)}"><title>{name}, expert {expert}: {ratio:.2f} x mean</title></rect>'
            )
            if cell >= 34:
                parts.append(
                    f'<text class="cell" x="{left + (expert + 0.5) * cell:.1f}" y="{y + tall / 2 + 3.5:.1f}" '
                    f'text-anchor="middle">{ratio:.2f}</text>'
                )
    base = top + L * tall
    every = max(1, round(E / 16))
    for expert in range(0, E, every):
        x = left + (expert + 0.5) * cell
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 15:.1f}" text-anchor="middle">{expert}</text>'
        )
    parts.append(
        f'<text class="tick" x="{2 * WIDTH - 12}" y="{base + 34:.1f}" text-anchor="end">expert</text>'
    )
    for index in range(41):
        ratio = index / 20
        parts.append(
            f'<rect x="{left + index * 5}" y="{base + 24:.1f}" width="5.2" height="10" fill="{_heat(ratio)}"/>'
        )
    parts.append(
        f'<text class="tick" x="{left + 213}" y="{base + 34:.1f}">0 to 2 x the layer\'s mean load</text>'
    )
    parts.append("</svg>")
    return "".join(parts)


def _heat(ratio: float) -> str:
    """Blue (0) over pale grey (1) to red (2 and more); readable on light and dark pages."""
    cold, mid, hot = (49, 104, 186), (226, 228, 230), (198, 57, 45)
    at = min(max(ratio, 0.0), 2.0)
    a, b, t = (cold, mid, at) if at < 1 else (mid, hot, at - 1)
    red, green, blue = (round(x + (y - x) * t) for x, y in zip(a, b, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"
