"""A plan as text: tables, and the mesh as a drawing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from dsv3_jax.parallel import MESH_AXES
from dsv3_jax.planning.hardware import LINK_SHARE, MATMUL_SHARE, NODE, USABLE
from dsv3_jax.planning.plan import Plan, table_of

# What each axis cuts, and what travels along it.
AXES = {
    "data": "rows of the batch, experts' master weights",
    "fsdp": "rows of the batch, weights (gathered where they are used)",
    "expert": "rows of the batch, experts (tokens travel), dense weights",
    "tensor": "heads and widths inside a layer",
}
_DRAWN = 64  # devices drawn one by one


def size(n: float) -> str:
    """Bytes for reading, 10^9 a GB."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= one:
            return f"{n / one:.2f} {unit}"
    return f"{n:.0f} B"


def seconds(s: float) -> str:
    """A duration for reading."""
    if s >= 1:
        return f"{s:.2f} s"
    return f"{s * 1e3:.2f} ms" if s >= 1e-3 else f"{s * 1e6:.1f} us"


def count(n: float) -> str:
    """Operations for reading."""
    for unit, one in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if n >= one:
            return f"{n / one:.2f} {unit}"
    return f"{n:.0f} "


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (1,)) -> list[str]:
    """Rows in columns; those in `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def memory_rows(plan: Plan) -> list[tuple[str, int, str]]:
    """Name, bytes and note of each part of the peak."""
    need = plan.memory
    lora = plan.lora is not None
    return [
        *([("frozen base", need.frozen, "as it is stored, exact")] if lora else []),
        ("parameters", need.parameters, f"float32 {'LoRA pairs' if lora else 'master weights'}, exact"),
        ("optimiser state", need.optimizer, "exact"),
        ("batch, routing biases", need.batch + need.other, "exact"),
        ("gradients", need.gradients, "of a micro-batch, and their float32 sums"),
        ("compute copies", need.copies, f"weights in {plan.cfg.model.dtype}, gathered once a step"),
        ("activations", need.activations, f"kept for backward, training.remat {plan.cfg.training.remat}"),
        ("workspace", need.workspace, need.phase),
    ]


def _memory(plan: Plan) -> list[str]:
    need = plan.memory
    rows = [(name, size(n), note) for name, n, note in memory_rows(plan)]
    share = need.peak / plan.usable
    rows.append(
        ("peak", size(need.peak), f"{100 * share:.0f} % of the {size(plan.usable)} that a step may fill")
    )
    others = ", ".join(f"{name} {size(n)}" for name, n in need.phases.items())
    verdict = "FITS" if plan.fits else "DOES NOT FIT"
    lines = [
        f"Memory of one {plan.hardware.name} ({size(plan.hardware.memory)}): {verdict}",
        *table(rows),
        f"  By phase: {others}.",
        f"  An estimate but for the exact rows. {100 * USABLE:.0f} % of the memory counts as usable: set "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}.",
        *([f"  {compiled_line(plan)}"] if plan.compiled is not None else []),
    ]
    if not plan.fits:
        largest = max(memory_rows(plan), key=lambda row: row[1])
        lines += [
            "",
            f"What does not fit: {size(need.peak - plan.usable)} too much; the largest part: {largest[0]}.",
        ]
        if plan.knobs:
            changes = [("change", "peak", "", "price")]
            for knob in plan.knobs:
                changes.append(
                    (knob.flags, size(knob.peak), "fits" if knob.peak <= plan.usable else "", knob.cost)
                )
            lines += ["What helps:", *table(changes)]
        else:
            lines.append("No single change of this config lowers the peak; use a GPU with more memory.")
    return lines


def _collectives(plan: Plan) -> list[str]:
    if plan.compiled is None:
        return []
    rows = [("collective", "runs a step", "sent by a device", "of it off the node")]
    by_row = table_of(plan.compiled.collectives)
    for name, row in by_row.items():
        rows.append((name, f"{row['runs']:,}", size(row["bytes"]), size(row["network_bytes"])))
    total = [sum(row[key] for row in by_row.values()) for key in ("bytes", "network_bytes")]
    rows.append(("all", "", size(total[0]), size(total[1])))
    lines = ["Collectives of the compiled step (loops counted as often as they run)", *table(rows, (1, 2, 3))]
    if more := sum(row["overflow_bytes"] for row in by_row.values()):
        lines.append(
            f"  For even routing; tokens beyond the buffers take further exchanges ({size(more)} for one a layer)."
        )
    if plan.cfg.moe.dispatch == "ragged_all_to_all":
        lines.append(
            "  moe.dispatch ragged_all_to_all is counted as all_to_all, its upper bound: only GPUs have it."
        )
    return lines


def leaf_rows(plan: Plan) -> list[tuple[str, str, str, str, str]]:
    """Path, shape, type, what is cut and bytes on a device of each leaf of a LoRA run."""
    if plan.lora is None:
        return []
    return [
        (
            row.path.removeprefix("params/"),
            " x ".join(f"{n:,}" for n in row.shape),
            row.stored,
            row.cut,
            size(row.nbytes),
        )
        for row in plan.lora.rows
    ]


def lora_line(plan: Plan) -> str:
    """What a LoRA run trains; nothing for full training."""
    if plan.lora is None:
        return ""
    trained, total = plan.lora.counts
    lora = plan.cfg.lora
    return (
        f"LoRA rank {lora.rank} on {lora.base}: {trained:,} parameters are trained ({100 * trained / total:.2f} %), "
        f"{total - trained:,} are frozen"
    )


def _lora(plan: Plan) -> list[str]:
    if plan.lora is None:
        return []
    head = ("leaf", "shape", "stored as", "cut: dimension and axes", "on a device")
    return [lora_line(plan), *table([head, *leaf_rows(plan)], (4,))]


def compiled_line(plan: Plan) -> str:
    """The compiled step's memory beside the estimate; nothing for a plan that was not compiled."""
    if plan.compiled is None:
        return ""
    need, said = plan.memory, plan.compiled
    line = f"Compiled for the CPU: arguments {size(said.argument_bytes)} (planned {size(need.arguments)})"
    if plan.cfg.model.dtype != "float32":
        return line + "; temporaries are not comparable in bfloat16, which XLA:CPU widens."
    return line + f", temporaries {size(said.temporary_bytes)} (planned {size(need.temporary)})."


def time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Name, duration and note of each part of a step's time; nothing for a plan that was not compiled."""
    times, gpu = plan.times, plan.hardware
    if times is None:
        return []
    rate = count(gpu.rate(plan.cfg.model.dtype))

    def speed(step: float, mfu: float) -> str:
        return f"{plan.tokens / step:,.0f} tokens/s, MFU {100 * mfu:.1f} %"

    links = f"NVLink {size(gpu.nvlink)}/s, network {size(gpu.network)}/s"
    return [
        (
            "products",
            seconds(times.compute),
            f"{100 * MATMUL_SHARE:.0f} % of {rate}FLOP/s, with what is recomputed",
        ),
        ("update", seconds(times.update), "weights and moments through memory once"),
        ("communication", seconds(times.communication), f"{100 * LINK_SHARE:.0f} % of {links}"),
        ("step, communication hidden", seconds(times.expected), speed(times.expected, times.mfu)),
        ("step, nothing hidden", seconds(times.exposed), speed(times.exposed, times.mfu_exposed)),
        ("lower bound", seconds(times.bound), "everything at its stated rate"),
    ]


def _times(plan: Plan) -> list[str]:
    compiled = plan.compiled
    if compiled is None:
        return []
    return [
        "Expected time of a step (the shares are assumptions, not measurements)",
        *table(time_rows(plan)),
        f"  Model operations {count(plan.model_flops)}FLOP a device and step, executed "
        f"{count(plan.executed_flops)}FLOP; {plan.tokens:,} tokens a step.",
        f"  Lowered in {compiled.lower_s:.1f} s, compiled in {compiled.compile_s:.1f} s on simulated devices.",
    ]


# --- the mesh -------------------------------------------------------------------------------------------------


def axis_rows(plan: Plan) -> list[tuple[str, int, str, str]]:
    """Axis, size, the links its groups use, what it cuts; outermost first."""
    rows = []
    inner = plan.devices
    for axis in MESH_AXES:
        n = plan.mesh[axis]
        inner //= n
        if n == 1:
            links = "-"
        elif inner * n <= NODE and NODE % (inner * n) == 0:
            links = "NVLink"
        elif inner >= NODE:
            links = "network"
        else:
            links = f"NVLink for {max(NODE // inner, 1)}, network between"
        rows.append((axis, n, links, AXES[axis]))
    return rows


def mesh_text(plan: Plan) -> str:
    """The mesh: its axes, and the devices in boxes of a node (or the nodes, where there are many)."""
    nodes = math.ceil(plan.devices / NODE)
    shape = " x ".join(f"{axis} {plan.mesh[axis]}" for axis in MESH_AXES)
    lines = [
        f"Mesh: {shape} = {plan.devices:,} devices, {nodes:,} node{'s' * (nodes > 1)} of {min(NODE, plan.devices)}"
    ]
    head = ("axis", "size", "links", "cuts")
    lines += table([head, *((axis, f"{n}", links, cuts) for axis, n, links, cuts in axis_rows(plan))])
    lines.append("")
    return "\n".join([*lines, *(_devices(plan.mesh) if plan.devices <= _DRAWN else _nodes(plan.mesh))])


def _devices(mesh: Mapping[str, int]) -> list[str]:
    """A box a node; a device is written by its number, its row by the outer axes, its column by expert and tensor."""
    columns = mesh["expert"] * mesh["tensor"]
    lines = []
    for row, (d, f) in enumerate(itertools.product(range(mesh["data"]), range(mesh["fsdp"]))):
        cells = []
        for column in range(columns):
            at = row * columns + column
            cells.append(("[" if at % NODE == 0 else "|" if column == 0 else " ") + f"{at:3d}")
        closed = "]" if (row + 1) * columns % NODE == 0 else "|"
        lines.append(f"  data {d} fsdp {f:2d}  " + "".join(cells) + closed)
    what = "expert" if mesh["tensor"] == 1 else f"expert x tensor {mesh['tensor']}"
    return [f"  a line: {what} 0 .. {columns - 1}; [ begins a node of {NODE}", *lines]


def coordinates(mesh: Mapping[str, int], device: int) -> dict[str, int]:
    """Where a device stands on each axis."""
    at = {}
    for axis in reversed(MESH_AXES):
        device, at[axis] = divmod(device, mesh[axis])
    return {axis: at[axis] for axis in MESH_AXES}


def _range(mesh: Mapping[str, int], first: int, last: int) -> str:
    a, b = coordinates(mesh, first), coordinates(mesh, last)
    parts = [
        f"{axis} {a[axis]}" + (f"-{b[axis]}" if b[axis] != a[axis] else "")
        for axis in MESH_AXES
        if mesh[axis] > 1
    ]
    return " ".join(parts)


def _nodes(mesh: Mapping[str, int]) -> list[str]:
    """The outer axes as a tree, with the nodes of the first and last branch."""
    devices = math.prod(mesh.values())
    nodes = math.ceil(devices / NODE)
    shown = [*range(min(4, nodes)), *range(max(nodes - 2, 4), nodes)]
    lines = []
    for before, node in zip([-1, *shown], shown, strict=False):
        if node != before + 1:
            lines.append(f"  {'':>8}  ... {node - before - 1:,} more")
        first = node * NODE
        last = min(first + NODE, devices) - 1
        boxes = "[" + "#" * (last - first + 1) + "]"
        lines.append(f"  node {node:4d} {boxes} {_range(mesh, first, last)}")
    return lines


def text(plan: Plan) -> str:
    """Everything, for a terminal."""
    training, model = plan.cfg.training, plan.cfg.model
    title = (
        f"Dry run of {plan.name}: {training.batch_size:,} sequences of {training.seq_len:,} tokens a step in "
        f"{training.accumulate} micro-batch{'es' * (training.accumulate > 1)}, {model.dtype}"
    )
    blocks = [[title], [mesh_text(plan)], _lora(plan), _memory(plan), _collectives(plan), _times(plan)]
    return "\n\n".join("\n".join(block) for block in blocks if block)
