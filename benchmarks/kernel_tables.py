"""Tables and the chart of kernels, from committed results of `benchmarks.compile_h200` and `benchmarks.gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.figures import _STYLE

Row = dict[str, Any]
NOT_MEASURED = "not measured"


def gpu_results() -> list[Row]:
    """Every committed run of a GPU."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu-*.json"))]


def compile_table() -> str:
    """Registers, shared memory, temporaries and compile time of kernels and whole programs compiled for H200."""
    result = json.loads((RESULTS / "compile_h200.json").read_text())
    lines = [
        "| program | registers | spilled bytes | shared memory, bytes | temporary, MiB | compiling, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in (*result["kernels"].items(), *result["programs"].items()):
        if "not_run" in row:
            lines.append(f"| {name} | not run: {row['not_run']} | | | | |")
            continue
        kernels = row.get("kernels", [])
        registers = ", ".join(str(n) for n in sorted({kernel["registers"] for kernel in kernels}))
        spilled = str(sum(kernel["spilled"] for kernel in kernels)) if kernels else ""
        shared = f"{row['shared_bytes']:,}" if kernels else ""
        temporary = f"{row['temporary_bytes'] / 2**20:,.1f}"
        lines.append(f"| {name} | {registers} | {spilled} | {shared} | {temporary} | {row['seconds']:.0f} |")
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    note = (
        "Registers: the different counts of a program's kernels. Times with other work on the machine (load "
        f"{env['load_before']:.0f}), so they say little. {versions}; {env['date']}, commit {env['commit']}."
    )
    return "\n".join([*lines, "", note])


def kernel_table() -> str:
    """Kernels on a GPU: time and share of the measured ceilings, beside the others."""
    runs = [run for run in gpu_results() if run.get("kernels")]
    if not runs:
        return f"Kernels on a GPU: {NOT_MEASURED}."
    lines = ["| device | kernel | by | ms | of product | of copy | error |", "|---|---|---|---|---|---|---|"]
    for run in runs:
        for row in run["kernels"]:
            name = f"{row['kernel']} {row['program']} {row['shape']} {row['dtype']}"
            for by, one in (*row["implementations"].items(), *row.get("rivals", {}).items()):
                lines.append(
                    f"| {run['environment']['family']} | {name} | {by} | {_cells(one, row['bound'])} |"
                )
        left = run.get("not_begun", [])
        if left:
            lines += ["", f"Not begun in the time: {', '.join(left)}.", ""]
    return "\n".join([*lines, "", *(_about(run) for run in runs)])


def fp8_table() -> str:
    """FP8 products against bfloat16."""
    runs = [run for run in gpu_results() if run.get("fp8")]
    if not runs:
        return f"FP8 matmul against bfloat16: {NOT_MEASURED}."
    lines = ["| device | product | by | TFLOP/s | of bfloat16 (XLA) |", "|---|---|---|---|---|"]
    for run in runs:
        for row in run["fp8"]:
            base = row["by"]["bfloat16 reference"].get("tflops")
            for by, one in row["by"].items():
                name = f"| {run['environment']['family']} | {row['shape']} | {by} |"
                if "tflops" in one:
                    share = f"{one['tflops'] / base:.2f}×" if base else ""
                    lines.append(f"{name} {one['tflops']:.0f} | {share} |")
                else:
                    lines.append(f"{name} {escape(one.get('refused', 'wrong'))[:120]} | |")
    return "\n".join([*lines, "", *(_about(run) for run in runs)])


def quantized_table() -> str:
    """Decode products with quantised weights against the floor of their bytes."""
    runs = [run for run in gpu_results() if run.get("quantized")]
    if not runs:
        return f"Decode products with quantised weights: {NOT_MEASURED}."
    lines = [
        "| device | weight | format | tokens | by | ms | of the floor | of bfloat16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for row in run["quantized"]:
            for by, one in row["by"].items():
                name = f"| {run['environment']['family']} | {row['shape']} | {row['format']} | {row['rows']} | {by} |"
                if "time" in one:
                    time, floor, wide = one["time"]["median"], one["of_floor"], one["of_bfloat16"]
                    lines.append(f"{name} {time:.4f} | {floor:.2f} | {wide:.2f}× |")
                else:
                    lines.append(f"{name} {escape(one.get('refused', 'wrong'))[:120]} | | |")
    return "\n".join([*lines, "", *(_about(run) for run in runs)])


def _cells(one: Row, bound: float) -> str:
    if "refused" in one:
        return f"{escape(one['refused'])[:120]} | | |"
    if "time" not in one:
        return f"wrong (bound {bound:.0e}) | | | {one['error']:.1e}"
    return (
        f"{one['time']['median']:.3f} | {one['of_product']:.2f} | {one['of_copy']:.2f} | {one['error']:.1e}"
    )


def _about(run: Row) -> str:
    env, peaks = run["environment"], run["ceilings"]
    copied, multiplied = peaks["bytes_per_s"] / 1e12, peaks["flops_per_s"] / 1e12
    return (
        f"{env['device']}: copy {copied:.2f} TB/s, product {multiplied:.0f} TFLOP/s in the same run; "
        f"jax {env['versions']['jax']}, {env['date']}, commit {env['commit']}."
    )


def model_table() -> str:
    """Train step and decoding on a GPU."""
    lines = ["| job | by | tokens/s | of the ceiling |", "|---|---|---|---|"]
    for job, by, row, share in _model_rows():
        if row is None:
            lines.append(f"| {job} | {by} | {NOT_MEASURED} | |")
        elif "refused" in row:
            lines.append(f"| {job} | {by} | {escape(row['refused'])[:120]} | |")
        else:
            told = "" if share is None else f"{share:.2f}"
            lines.append(f"| {job} | {by} | {row['tokens_per_s']:,.0f} | {told} |")
    return "\n".join([*lines, "", *(_about(run) for run in gpu_results())]).rstrip()


def _model_rows() -> Iterator[tuple[str, str, Row | None, float | None]]:
    train = "train step, 1.75e9 parameters, 8 x 4096 tokens"
    runs = gpu_results()
    if not any("train" in run for run in runs):
        yield train, "dsv3_jax", None, None
        yield train, "transformers, torch.compile", None, None
    if not any("decode" in run for run in runs):
        for batch in (1, 64, 256):
            yield f"decode, 16B-A3B, batch {batch}, context 1024", "dsv3_jax", None, None
    for run in runs:
        where = run["environment"]["family"]
        if "train" in run:
            for name, row in run["train"]["ours"].items():
                yield f"{train}, {where}", f"dsv3_jax {name}", row, row.get("mfu")
            theirs = run["train"]["transformers"]
            yield f"{train}, {where}", "transformers, torch.compile", theirs, theirs.get("mfu")
        for row in run.get("decode", {}).get("rows", []):
            job = f"decode, 16B-A3B, batch {row['batch']}, context {run['decode']['context']}, {where}"
            share = row["tokens_per_s"] / row["ceiling_tokens_per_s"] if "tokens_per_s" in row else None
            yield job, f"dsv3_jax {row['kernels']}", row, share


def chart(run: Row) -> str:
    """An SVG of bars: the share of the nearer ceiling that every right implementation reaches."""
    bars: list[tuple[str, str, float]] = []
    for row in run.get("kernels", []):
        for by, one in (*row["implementations"].items(), *row.get("rivals", {}).items()):
            if "time" in one:
                share = max(one["of_product"], one["of_copy"])
                bars.append((f"{row['kernel']} {row['program']} {row['shape']}", by, share))
    height, left, width = 18, 420, 300
    title = f"Share of the measured ceiling, {escape(run['environment']['device'])}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {40 + height * len(bars)}" width="800">',
        f"<style>{_STYLE} .bar1 {{ fill:var(--c1) }} .bar2 {{ fill:var(--soft) }}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text class="title" x="16" y="20">{title}</text>',
    ]
    for at, (name, by, share) in enumerate(bars):
        y = 34 + height * at
        color = 1 if by in ("mosaic", "auto") else 2
        parts.append(f'<text class="name" x="16" y="{y + 11}">{escape(name)}: {escape(by)}</text>')
        parts.append(
            f'<rect class="bar{color}" x="{left}" y="{y}" width="{width * min(share, 1.2):.1f}" height="12"/>'
        )
        parts.append(
            f'<text class="tick" x="{left + width * min(share, 1.2) + 6:.1f}" y="{y + 11}">{share:.2f}</text>'
        )
    return "".join(parts) + "</svg>\n"
