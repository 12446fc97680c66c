"""README tables from committed results: `python -m benchmarks.tables [--check]`.

Each table stands between `<!-- table:NAME -->` and `<!-- /table -->`; --check fails when one is out of date.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import cache_tables, kernel_tables, quality_tables
from benchmarks.quality_tables import kl, load, perplexity

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/performance.md",
    "docs/planning.md",
    "docs/training.md",
    "docs/kernels.md",
    "docs/quantization.md",
    "docs/finetuning.md",
)


def _where(result: dict[str, Any]) -> str:
    env = result["environment"]
    versions = ", ".join(
        f"{name} {v}" for name, v in env["versions"].items() if v and name in ("jax", "torch", "transformers")
    )
    told = f" The machine was also doing other work (load {env['load_before']:.1f} before the run)."
    busy = told if env["load_before"] > 0.5 else ""
    return f"{env['date']}, {env['cpu']} ({env['cores']} cores), {versions}, commit {env['commit']}.{busy}"


def cpu_table() -> str:
    """Training, prefill and decode against transformers on the ~113M shape."""
    result = load("cpu")
    lines = [
        "| job | dsv3_jax tokens/s | transformers tokens/s | ratio, median (min to max) | target |",
        "|---|---|---|---|---|",
    ]
    for job in result["jobs"]:
        ratio = job["ratio"]
        speeds = (
            f"{job['ours_tokens_per_s']:,.0f} | {job['theirs_tokens_per_s']:,.0f} ({job['their_settings']})"
        )
        spread = f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(f"| {job['name']} | {speeds} | {spread} | ≥ {job['target']:.1f}× |")
    rounds = result["rounds"]
    return "\n".join(
        [*lines, "", f"Medians of {rounds} interleaved rounds, float32, two threads. {_where(result)}"]
    )


def experts_table() -> str:
    """Cost per token as the number of experts grows at a fixed active size."""
    result = load("experts")
    lines = ["| experts | tokens/s, forward + backward | cost per token |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(f"| {row['experts']} | {row['tokens_per_s']:,.0f} | {row['relative_cost']:.2f}× |")
    return "\n".join(
        [
            *lines,
            "",
            f"{result['tokens']:,} tokens a step, {result['rounds']} interleaved rounds. {_where(result)}",
        ]
    )


def compile_time_table() -> str:
    """Seconds to compile the train step as layers grow."""
    result = load("compile_time")
    lines = ["| layers | lowering | compiling | of the first row |", "|---|---|---|---|"]
    for row in result["rows"]:
        lower, compile_ = statistics.median(row["lower_s"]), statistics.median(row["compile_s"])
        lines.append(f"| {row['layers']} | {lower:.1f} s | {compile_:.1f} s | {row['relative']:.2f}× |")
    where = _where(result)
    return "\n".join(
        [*lines, "", f"Medians of {result['rounds']} rounds in turn; target ≤ {result['target']}×. {where}"]
    )


def convert_table() -> str:
    """Conversion against `cp` of the same bytes."""
    result = load("convert")
    lines = [
        "| job | GB/s written | against cp, median (min to max) | target | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for job in result["jobs"]:
        ratio, cpu = job["ratio"], statistics.median(job["cpu_seconds"])
        target = "" if job["target"] is None else f"≥ {job['target']:.2f}×"
        spread = f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(f"| {job['name']} | {job['written_GB_per_s']:.2f} | {spread} | {target} | {cpu:.1f} |")
    size = result["bytes"]["bf16"] / 1e9
    note = (
        f"{size:.1f} GB written by every job, flushed to the disk, source in the page cache; medians of "
        f"{result['rounds']} interleaved rounds. {_where(result)}"
    )
    return "\n".join([*lines, "", note])


def _gb(n: float) -> str:
    return f"{n / 1e9:,.0f}" if n >= 1e10 else f"{n / 1e9:.1f}"


def fit_table() -> str:
    """Peak memory of three models on the mesh presets, and what fits which GPU."""
    result = load("fit")
    lines = [
        "| model | GPUs | state | peak: none | latents | full | full, 8 micro-batches | H100 | H200 | B200 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peaks = [_gb(row["peaks"][key]["peak"]) for key in ("none, 1", "latents, 1", "full, 1", "full, 8")]
        words = []
        for least in row["least_remat"].values():
            one, more = least["1"], least["8"]
            words.append("no" if one is None else f"{one}" if more else f"{one}, one micro-batch")
        lines.append(
            f"| {row['model']} | {row['devices']:,} | {_gb(row['state'])} | {' | '.join(peaks)} | {' | '.join(words)} |"
        )
    note = (
        f"GB a device; one sequence of {result['seq_len']:,} tokens a device and micro-batch, bfloat16 with float32 "
        "weights and the config's moments (bfloat16 for V3). The last columns name the least training.remat with which "
        "one micro-batch fits into "
        f"{100 * result['usable']:.0f} % of the GPU's memory; “one micro-batch” where accumulation does not fit. "
        "Estimates of the memory model: state is exact, the rest has not been checked on a GPU. "
        f"Commit {result['environment']['commit']}."
    )
    return "\n".join([*lines, "", note])


def scaling_table() -> str:
    """Bytes a device sends in a step of the 671B model as devices grow with the batch."""
    result = load("scaling")
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
    lines = [
        f"| devices | mesh | {' | '.join(f'{kind}, GB' for kind in kinds)} | all, GB | of it off the node, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        mesh = " × ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
        sent = [row["kinds"].get(kind, {}).get("bytes", 0) for kind in kinds]
        total, off = (sum(kind[key] for kind in row["kinds"].values()) for key in ("bytes", "network_bytes"))
        cells = " | ".join(f"{n / 1e9:,.2f}" for n in (*sent, total, off))
        lines.append(f"| {row['devices']:,} | {mesh} | {cells} |")
    note = (
        "One sequence of 4,096 tokens a device and step, bfloat16; read from the compiled step, even routing."
    )
    return "\n".join([*lines, "", f"{note} Commit {result['environment']['commit']}."])


def planning_table() -> str:
    """What planning the 671B model takes."""
    result = load("plan_full")
    lines = ["| devices | seconds | seconds of CPU | peak memory, GB |", "|---|---|---|---|"]
    for run in result["runs"]:
        lines.append(
            f"| {run['devices']:,} | {run['seconds']:.0f} | {run['cpu_seconds']:.0f} | {run['peak_bytes'] / 1e9:.1f} |"
        )
    return "\n".join([*lines, "", _where(result)])


def quantized_quality_table(name: str = "quantized_quality") -> str:
    """What each format costs in quality on a trained model."""
    result = load(name)
    lines = [
        "| format | rounding | of float32 | perplexity | KL, nats a token | same next token | other text: perplexity "
        "| KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "share_of_float32" in row:
            first, second = row["texts"]
            lines.append(
                f"| {row['format']} | {_rounding(row)} | {row['share_of_float32']:.3f} | {perplexity(first)} | "
                f"{kl(first)} | {100 * first['greedy_agreement']:.1f} % | {perplexity(second)} | {kl(second)} |"
            )
    first, second = result["rows"][0]["texts"]
    held_out, other = result["texts"]
    trained, later = result["trained"], result.get("second_run")
    again = ""
    if later:
        rows = ", ".join(f"{fmt} {quality_tables.ROUNDING.get(how, how)}" for fmt, how in later["rows"])
        again = f" From a second run at {later['environment']['commit']}: {rows}; {later['note']}."
    return "\n".join(
        [
            *lines,
            "",
            f"{result['parameters'] / 1e6:.1f}M parameters after {trained['tokens'] / 1e6:.2f}M tokens (step "
            f"{result['step']:,}, held-out loss {trained['val_loss']:.2f}). Changes against float32 ± standard error "
            f"(bootstrap over windows of {result['window']} tokens). Text: {first['tokens']:,} tokens of {held_out}, "
            f"perplexity {first['perplexity_reference']:.2f} in float32; other text: {second['tokens']:,} of {other}, "
            f"{second['perplexity_reference']:.2f}. Calibrated on {result['calibration']}. {_when(result)}{again}",
        ]
    )


def quantized_quality_100m_table() -> str:
    """The same of the ~113M model."""
    return quantized_quality_table("quantized_quality_100m")


def quantized_peers_table() -> str:
    """Rounding to nearest by other libraries, on the same weights."""
    result = load("quantized_quality")
    lines = [
        "| format | by | same values as ours | error of weights | perplexity against ours | KL, nats a token | "
        "other text: perplexity against ours | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peers = {row["format"] for row in result["rows"] if "same_as_nearest" in row}
    for row in result["rows"]:
        if row["format"] not in peers or "texts" not in row:
            continue
        by = row["rounding"] if "same_as_nearest" in row else f"ours, {_rounding(row)}"
        same = f"{100 * row['same_as_nearest']:.1f} %" if "same_as_nearest" in row else ""
        cells = []
        for text in row["texts"]:
            nearest = row["rounding"] == "nearest"
            cells += ["" if nearest else perplexity(text["against_nearest"]), kl(text)]
        lines.append(f"| {row['format']} | {by} | {same} | {row['error']:.4f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"The model and texts of the table above. {_when(result)}"])


def _rounding(row: dict[str, Any]) -> str:
    return quality_tables.ROUNDING.get(row["rounding"], row["rounding"])


def _when(result: dict[str, Any]) -> str:
    return f"{result['environment']['date']}, commit {result['environment']['commit']}."


def quantized_speed_table() -> str:
    """Decoding and memory by format."""
    result = load("quantized_speed")
    lines = [
        "| weights | MB | peak MB | tokens/s, 1 prompt | against float32 | tokens/s, 16 prompts | against float32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['format']} | {row['weight_mb']:.0f} | {row['peak_mb']:.0f} | {row['decode_1']:.0f} | "
            f"{row['decode_1_ratio']:.2f}× | {row['decode_16']:.0f} | {row['decode_16_ratio']:.2f}× |"
        )
    return "\n".join([*lines, "", f"Medians of {result['rounds']} rounds. {_where(result)}"])


TABLES: dict[str, Callable[[], str]] = {
    "cpu": cpu_table,
    "experts": experts_table,
    "compile_time": compile_time_table,
    "convert": convert_table,
    "fit": fit_table,
    "planning": planning_table,
    "quantized_quality": quantized_quality_table,
    "quantized_quality_100m": quantized_quality_100m_table,
    "quantized_peers": quantized_peers_table,
    "quantized_targets": quality_tables.targets_table,
    "rounding_choice": quality_tables.choice_table,
    "finetuning": quality_tables.finetuning_table,
    "quantized_speed": quantized_speed_table,
    **cache_tables.TABLES,
    "scaling": scaling_table,
    "compile_h200": kernel_tables.compile_table,
    "gpu_kernels": kernel_tables.kernel_table,
    "gpu_fp8": kernel_tables.fp8_table,
    "gpu_quantized": kernel_tables.quantized_table,
    "gpu_models": kernel_tables.model_table,
}


def main() -> int:
    """Rewrite the tables in the pages, or with --check only compare."""
    check = "--check" in sys.argv[1:]
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            continue
        text = path.read_text()

        def fill(match: re.Match[str]) -> str:
            return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /table -->"

        fresh = re.sub(r"<!-- table:(\w+) -->\n.*?<!-- /table -->", fill, text, flags=re.DOTALL)
        if fresh != text:
            stale.append(page)
            if not check:
                path.write_text(fresh)
    for run in kernel_tables.gpu_results():
        path = ROOT / "docs" / "results" / f"gpu-{run['environment']['family'].lower()}.svg"
        drawn = kernel_tables.chart(run)
        if not path.exists() or path.read_text() != drawn:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(drawn)
    print(("stale: " if check else "rewritten: ") + (", ".join(stale) or "none"))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
