"""Tables of what quantisation costs, from committed results (`benchmarks.tables`)."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import RESULTS

ROUNDING = {"gptq": "gptq, columns as they come", "gptq+order": "gptq"}
# The project's bounds on the change of perplexity against bfloat16, in percent, and which rounding they are of.
TARGETS = (
    ("int8", "nearest", 0.1),
    ("int8", "gptq+order", 0.1),
    ("fp8", "nearest", 0.3),
    ("int4:128", "gptq+order", 2.0),
    ("int4:64", "gptq+order", 2.0),
)


def load(name: str) -> dict[str, Any]:
    """A result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def perplexity(text: dict[str, Any]) -> str:
    """Change of perplexity in percent, with its standard error."""
    return f"{100 * (text['perplexity_ratio'] - 1):+.2f} ± {100 * text['perplexity_ratio_error']:.2f} %"


def kl(text: dict[str, Any]) -> str:
    """KL divergence in nats a token, with its standard error."""
    return f"{text['kl_mean']:.1e} ± {text['kl_error']:.0e}"


def targets_table() -> str:
    """Perplexity against bfloat16 beside the bounds, and calibrated against nearest over the same tokens."""
    lines = [
        "| model, text | format | rounding | perplexity against bfloat16 | bound | KL against nearest | "
        "of its standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model in (("quantized_quality", "3.2M"), ("quantized_quality_100m", "113M")):
        result = load(name)
        for at, text in enumerate(result["texts"]):
            for fmt, rounding, bound in TARGETS:
                found = [r for r in result["rows"] if (r["format"], r["rounding"]) == (fmt, rounding)]
                if not found:
                    continue
                one = found[0]["texts"][at]
                half, near = one["against_bfloat16"], one["against_nearest"]
                versus = f"{near['kl']:+.1e} ± {near['kl_error']:.0e} | {near['kl_z']:+.1f}"
                cells = f"{perplexity(half)} | ± {bound} % | {versus if rounding != 'nearest' else ' | '} |"
                lines.append(
                    f"| {model}, {text.replace('_', ' ')} | {fmt} | {ROUNDING.get(rounding, rounding)} | {cells}"
                )
    return "\n".join([*lines, "", "Paired: differences of the same tokens, standard errors over windows."])


def choice_table() -> str:
    """Settings of GPTQ on the text that they were chosen on."""
    result = load("rounding_choice")
    lines = [
        "| format | columns | clippings tried | damping | KL | against the first | of its standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        against = row["against_default"]
        order = "by activations" if row["rounding"] == "gptq+order" else "as they come"
        change = f"{against['kl']:+.1e} ± {against['kl_error']:.0e} | {against['kl_z']:+.1f}"
        lines.append(
            f"| {row['format']} | {order} | {row['clippings']} | {row['damping']} | {row['kl']:.2e} | "
            f"{change if against['kl_error'] else ' | '} |"
        )
    note = f"{result['tokens']:,} tokens of {result['text']}; {result['environment']['date']}."
    return "\n".join([*lines, "", note])


def finetuning_table() -> str:
    """Bytes and held-out losses of LoRA by the base's format."""
    result = load("finetuning")
    steps = [result["every"] * (n + 1) for n in range(result["steps"] // result["every"])]
    lines = [
        "| base of the demo's model (3.2M weights), rank 8, all-linear | base, MiB | pairs | moments | "
        f"held-out loss after {', '.join(map(str, steps))} steps | end against float32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        losses = ", ".join(f"{loss:.3f}" for loss in row["held_out"][0])
        lines.append(
            f"| {row['base']} | {row['base_mib']:.1f} | {row['pairs_mib']:.1f} | {row['moments_mib']:.1f} | {losses} | "
            f"{100 * row['off_float32'][0][-1]:+.2f} % |"
        )
    full = result["full_training"]
    lines.append(
        f"| all weights trained | {full['weights_mib']:.1f} | | {full['moments_mib']:.1f} | not run | |"
    )
    env = result["environment"]
    note = (
        f"{result['tokens_a_step']:,} tokens a step of Python's standard library, seed 0, one run each "
        f"(`python -m benchmarks.finetuning`). {env['date']}, commit {env['commit']}."
    )
    return "\n".join([*lines, "", note])
