"""Charts of the report page as SVG files that stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dsv3_jax.training.charts import HEIGHT, WIDTH

_STYLE = """
svg { font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; --text:#1c2126; --soft:#5c6670; --grid:#e4e7ea;
 --page:#ffffff; --c1:#1f6fb8; --c2:#d1692b; --c3:#2f8f5b; --c4:#8a56b0 }
@media (prefers-color-scheme: dark) { svg { --text:#e6e9ec; --soft:#9aa5af; --grid:#2d3338; --page:#14171a;
 --c1:#6ab0ee; --c2:#f0995f; --c3:#6cc795; --c4:#bf93e0 } }
.page { fill:var(--page) } .title { fill:var(--text); font-size:14px; font-weight:600 } .grid { stroke:var(--grid) }
.tick, .name { fill:var(--soft); font-size:12px } .line { fill:none; stroke-width:2; stroke-linejoin:round }
.line.faint { stroke-width:1; opacity:.3 } .line.c1 { stroke:var(--c1) } .line.c2 { stroke:var(--c2) }
.line.c3 { stroke:var(--c3) } .line.c4 { stroke:var(--c4) }
.key.c1 { fill:var(--c1) } .key.c2 { fill:var(--c2) } .key.c3 { fill:var(--c3) } .key.c4 { fill:var(--c4) }
"""


def standalone(panels: Sequence[tuple[str, str]], names: Sequence[tuple[str, int]]) -> str:
    """An SVG file of charts below one another, with the colours of both kinds of page.

    Args:
      panels: title and `line_chart` of each.
      names: the legend: name and colour.
    """
    head, row = 34, HEIGHT + 36
    height = head + row * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
        f'<style>{_STYLE}</style><rect class="page" width="100%" height="100%"/>',
    ]
    x = 16
    for name, color in names:
        parts.append(f'<rect class="key c{color}" x="{x}" y="13" width="16" height="4" rx="2"/>')
        parts.append(f'<text class="name" x="{x + 22}" y="19">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    for at, (title, chart) in enumerate(panels):
        y = head + at * row
        drawn = chart.split("</svg>")[0].replace(
            "<svg ", f'<svg y="{y + 24}" width="{WIDTH}" height="{HEIGHT}" ', 1
        )
        parts.append(f'<text class="title" x="16" y="{y + 16}">{escape(title)}</text>{drawn}</svg>')
    return "".join(parts) + "</svg>\n"
