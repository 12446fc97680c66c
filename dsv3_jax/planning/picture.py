"""A plan as one page that needs nothing else, and its mesh as an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from dsv3_jax.parallel import MESH_AXES
from dsv3_jax.planning.hardware import NODE, USABLE
from dsv3_jax.planning.plan import Plan, table_of
from dsv3_jax.planning.show import (
    axis_rows,
    compiled_line,
    coordinates,
    count,
    leaf_rows,
    lora_line,
    memory_rows,
    size,
    time_rows,
)

_WIDTH = 960
_NUMBERED = 64  # devices that are drawn large, with their numbers
_COLORS = ("#4269d0", "#7aa2f7", "#8a8f98", "#efb118", "#3ca951", "#ff725c", "#a463f2")  # parts of the peak
_FROZEN = "#1b9e9e"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:32px auto;padding:0 16px;color:#1d2330;
background:#fff}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}p{margin:4px 0;color:#4b5363}
table{border-collapse:collapse;width:100%;font-size:14px}td,th{padding:4px 10px 4px 0;text-align:left;
vertical-align:top}
th{color:#4b5363;font-weight:600}tr+tr td{border-top:1px solid #e6e8ee}.r{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}.ok{color:#1a7f37}.bad{color:#b42318}svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:#1d2330}svg .note{fill:#4b5363}code{font-size:13px}
i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:7px}
@media(prefers-color-scheme:dark){
body{color:#e6e9ef;background:#14171d}p,th{color:#a3abba}tr+tr td{border-color:#2a2f3a}
svg text{fill:#e6e9ef}svg .note{fill:#a3abba}.ok{color:#57c278}.bad{color:#ff8a7a}}
"""


def mesh_svg(plan: Plan) -> str:
    """Devices as squares in boxes of a node, in their order; the hue follows the expert axis, the shade fsdp."""
    mesh, devices = plan.mesh, plan.devices
    large = devices <= _NUMBERED
    side, gap = (46, 4) if large else (8, 1)
    across = 4 if devices >= NODE // 2 else devices
    box_w, box_h = across * (side + gap) + gap + 4, math.ceil(NODE / 4) * (side + gap) + gap + 4
    label = 150
    columns = max((_WIDTH - label) // (box_w + 6), 1)
    if columns >= 4:  # lines that begin at round numbers
        columns = 2 ** int(math.log2(columns))
    nodes = math.ceil(devices / NODE)
    lines = math.ceil(nodes / columns)
    height = lines * (box_h + 6) + 40
    shapes: list[str] = []
    for node in range(nodes):
        line, column = divmod(node, columns)
        x0, y0 = label + column * (box_w + 6), 26 + line * (box_h + 6)
        if column == 0:
            at = coordinates(mesh, node * NODE)
            text = ", ".join(f"{axis} {at[axis]}" for axis in MESH_AXES if mesh[axis] > 1) or "one device"
            shapes.append(f'<text x="0" y="{y0 + box_h / 2 + 4:.0f}">{text}</text>')
        shapes.append(
            f'<rect x="{x0}" y="{y0}" width="{box_w}" height="{box_h}" rx="4" fill="none" stroke="#8a8f98"/>'
        )
        for place, device in enumerate(range(node * NODE, min((node + 1) * NODE, devices))):
            shapes += _device(plan, device, x0, y0, place, side, gap, across, large)
    node_word = f"{nodes:,} node{'s' * (nodes > 1)}"
    legend = [name for axis, name in (("expert", "hue: expert"), ("fsdp", "shade: fsdp")) if mesh[axis] > 1]
    note = (
        f"{devices:,} devices in {node_word} of {min(NODE, devices)}; a line begins at what stands left of it"
    )
    note = "; ".join([note, *legend])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><title>mesh</title><text class="note" x="0" y="14">{escape(note)}</text>'
        + "".join(shapes)
        + "</svg>\n"
    )


def _device(
    plan: Plan, device: int, x0: int, y0: int, place: int, side: int, gap: int, across: int, large: bool
) -> Iterator[str]:
    mesh, at = plan.mesh, coordinates(plan.mesh, device)
    hue = 215 if mesh["expert"] == 1 else 300 * at["expert"] / mesh["expert"]
    light = 62 if mesh["fsdp"] == 1 else 45 + 32 * at["fsdp"] / (mesh["fsdp"] - 1)
    x, y = x0 + 4 + place % across * (side + gap), y0 + 4 + place // across * (side + gap)
    where = ", ".join(f"{axis} {at[axis]}" for axis in MESH_AXES)
    yield (
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" rx="2" fill="hsl({hue:.0f} 60% {light:.0f}%)">'
        f"<title>device {device}: {where}</title></rect>"
    )
    if large:
        short = " ".join(f"{axis[0]}{at[axis]}" for axis in MESH_AXES if mesh[axis] > 1)
        yield (
            f'<text x="{x + 4}" y="{y + 16}" style="fill:#10131a">{device}</text>'
            f'<text x="{x + 4}" y="{y + side - 8}" style="fill:#10131a;font-size:9.5px">{short}</text>'
        )


def _colors(plan: Plan) -> tuple[str, ...]:
    return _COLORS if plan.lora is None else (_FROZEN, *_COLORS)


def _memory_svg(plan: Plan) -> str:
    """The parts of the peak as one bar, and a line where the usable memory ends."""
    end = max(plan.memory.peak, plan.hardware.memory) * 1.02
    x, shapes = 0.0, []
    for (name, n, _), color in zip(memory_rows(plan), _colors(plan), strict=True):
        width = n / end * _WIDTH
        shapes.append(
            f'<rect x="{x:.1f}" y="22" width="{width:.1f}" height="34" fill="{color}"><title>{name}: {size(n)}'
            "</title></rect>"
        )
        x += width
    for value, text in ((plan.usable, f"usable {size(plan.usable)}"), (plan.hardware.memory, "")):
        at = value / end * _WIDTH
        shapes.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="16" y2="62" stroke="#b42318" stroke-dasharray="4 3"/>'
        )
        if text:
            shapes.append(
                f'<text class="note" x="{at:.1f}" y="12" text-anchor="{"end" if at > 700 else "start"}">{text}</text>'
            )
    return f'<svg viewBox="0 0 {_WIDTH} 66">{"".join(shapes)}</svg>'


def _rows(rows: Sequence[Sequence[str]], right: Sequence[int] = (1,), head: Sequence[str] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        parts = (f"<{tag}{' class=r' if i in right else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table>{line(head, 'th') if head else ''}{body}</table>"


def page(plan: Plan) -> str:
    """The whole plan as HTML."""
    need, training = plan.memory, plan.cfg.training
    verdict = '<b class="ok">fits</b>' if plan.fits else '<b class="bad">does not fit</b>'
    colored = [
        (f'<i style="background:{color}"></i>{escape(name)}', size(n), escape(note))
        for (name, n, note), color in zip(memory_rows(plan), _colors(plan), strict=True)
    ]
    colored.append(
        ("<b>peak</b>", f"<b>{size(need.peak)}</b>", f"{100 * need.peak / plan.usable:.0f} % of usable")
    )
    parts = [
        f"<h1>Plan of {escape(plan.name)}</h1>",
        f"<p>{plan.devices:,} × {plan.hardware.name}: {verdict}. {training.batch_size:,} sequences of "
        f"{training.seq_len:,} tokens a step, {training.accumulate} micro-batches, {plan.cfg.model.dtype}, "
        f"remat {training.remat}.</p>",
        f"<h2>Mesh</h2>{mesh_svg(plan)}",
        _rows(
            [(a, f"{n}", b, escape(c)) for a, n, b, c in axis_rows(plan)],
            head=("axis", "size", "links", "cuts"),
        ),
        f"<h2>Memory of one {plan.hardware.name}</h2>{_memory_svg(plan)}{_rows(colored)}",
        f"<p>An estimate but for the exact rows. {100 * USABLE:.0f} % of {size(plan.hardware.memory)} counts as usable "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}). By phase: "
        + ", ".join(f"{name} {size(n)}" for name, n in need.phases.items())
        + f".</p><p>{compiled_line(plan)}</p>",
    ]
    if plan.lora is not None:
        head = ("leaf", "shape", "stored as", "cut: dimension and axes", "on a device")
        cells = [[escape(cell) for cell in row] for row in leaf_rows(plan)]
        parts.append(f"<h2>Weights</h2><p>{escape(lora_line(plan))}</p>{_rows(cells, (4,), head)}")
    if plan.knobs:
        rows = [
            (
                f"<code>{escape(knob.flags)}</code>",
                size(knob.peak),
                "fits" if knob.peak <= plan.usable else "",
                knob.cost,
            )
            for knob in plan.knobs
        ]
        parts.append(f"<h2>What helps</h2>{_rows(rows, head=('change', 'peak', '', 'price'))}")
    parts += [_collectives(plan), _times(plan)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Plan of {escape(plan.name)}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _collectives(plan: Plan) -> str:
    if plan.compiled is None:
        return ""
    rows = [
        (
            name,
            f"{row['runs']:,}",
            size(row["bytes"]),
            size(row["network_bytes"]),
        )
        for name, row in table_of(plan.compiled.collectives).items()
    ]
    head = ("collective, devices", "runs a step", "sent by a device", "of it off the node")
    return f"<h2>Collectives of the compiled step</h2>{_rows(rows, (1, 2, 3), head)}"


def _times(plan: Plan) -> str:
    if plan.times is None:
        return ""
    rows = [[escape(cell) for cell in row] for row in time_rows(plan)]
    return (
        f"<h2>Expected time of a step</h2>{_rows(rows)}<p>The shares are assumptions, not measurements. Model "
        f"operations {count(plan.model_flops)}FLOP a device and step, executed {count(plan.executed_flops)}FLOP.</p>"
    )
