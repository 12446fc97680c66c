"""report.html: what a run did, as one page that needs nothing else. `python -m dsv3_jax.training.report RUN_DIR`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsv3_jax.config import load_yaml
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.training.cards import (
    card,
    expert_cards,
    machine_cards,
    multi_token_cards,
    optimizer_cards,
    series,
    smooth,
)
from dsv3_jax.training.charts import WIDTH, line_chart, number
from dsv3_jax.training.metrics import Record, duration, read_metrics
from dsv3_jax.training.run_folder import CONFIG, METRICS, REPORT, write_whole

_STYLE = Path(__file__).with_name("report.css")


def write_report(run: str | Path, samples: str | Path | None = None) -> Path:
    """Write `run`/report.html from its metrics.jsonl and config.yaml alone.

    Args:
      samples: JSONL of infer.py with `prompt` and `text`, shown at the end; default: samples.jsonl in the folder.
    Raises:
      ConfigError: not a run folder.
      DataError: an unreadable line of metrics.jsonl.
    """
    run = Path(run)
    if not (run / METRICS).is_file() or not (run / CONFIG).is_file():
        raise ConfigError(f"{run}: not a run folder ({METRICS} and {CONFIG} expected)")
    records, config = read_metrics(run / METRICS), load_yaml(run / CONFIG)
    path = Path(samples) if samples is not None else run / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    page = render(run.absolute().name, records, config, [json.loads(line) for line in lines])
    write_whole(run / REPORT, page)
    return run / REPORT


def render(name: str, records: Sequence[Record], config: Mapping[str, Any], samples: Sequence[Record]) -> str:
    """The page."""
    cards = []
    if records:
        cards.append(card("Loss (nats per token)", _loss(records), "wide"))
        cards += [*multi_token_cards(records), *optimizer_cards(records), *machine_cards(records)]
        cards += expert_cards(records, config)
    if samples:
        cards.append(card("Samples", "".join(_sample(sample) for sample in samples), "wide"))
    cards.append(card("Configuration", _config(config), "wide"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}</title><style>{_STYLE.read_text()}</style>"
        f'<h1>{escape(name)}</h1><p class="sub">{_subtitle(records, config)}</p>{_numbers(records)}'
        f'<div class="cards">{"".join(cards)}</div></html>\n'
    )


def _loss(records: Sequence[Record]) -> str:
    lines = smooth(records, "ce_loss", "training, next token")
    if records[-1].get("mtp_loss"):
        lines += smooth(records, "mtp_loss", "training, multi-token module", 2)
    lines.append(series(records, "val_loss", "held-out", 3, dots=True))
    if any(record.get("val_mtp_loss") is not None for record in records):
        lines.append(series(records, "val_mtp_loss", "held-out, multi-token module", 4, dots=True))
    return line_chart(lines, width=2 * WIDTH, height=320)


def _subtitle(records: Sequence[Record], config: Mapping[str, Any]) -> str:
    if not records:
        return "no step recorded"
    model, seconds = config["model"], sum(record.get("seconds", 0.0) for record in records)
    parts = [
        f"{records[-1]['step']:,} of {config['training']['steps']:,} steps in {duration(seconds)}",
        f"{records[-1]['tokens']:,} tokens of {_sources(records[-1], config['data'])}",
        f"{model['num_hidden_layers']} layers of width {model['hidden_size']:,}",
    ]
    if model["n_routed_experts"]:
        parts.append(f"{model['n_routed_experts']} experts, {model['num_experts_per_tok']} per token")
    return " · ".join(parts)


def _sources(record: Record, data: Mapping[str, Any]) -> str:
    """The source, or those of a mixture with their shares of the rows so far."""
    if not record.get("shares"):
        return escape(str(data["source"]))
    return ", ".join(f"{escape(name)} ({share:.1%})" for name, share in record["shares"].items())


def _numbers(records: Sequence[Record]) -> str:
    if not records:
        return ""
    tail = records[-max(len(records) // 50, 1) :]

    def mean(key: str) -> float | None:
        values = [record[key] for record in tail if record.get(key) is not None]
        return sum(values) / len(values) if values else None

    validated = next((record for record in reversed(records) if record.get("val_loss") is not None), {})
    shown = [
        ("training loss", mean("ce_loss")),
        ("held-out loss", validated.get("val_loss")),
        ("held-out perplexity", validated.get("val_perplexity")),
        ("held-out bits per byte", validated.get("val_bits_per_byte")),
        ("multi-token loss", mean("mtp_loss") or None),
        ("drafts accepted", validated.get("val_mtp_acceptance")),
        ("MaxVio", mean("maxvio")),
        ("experts within ±50 % of mean load", mean("balanced_fraction")),
        ("tokens per second", mean("tokens_per_s")),
        ("TFLOP/s", mean("tflops")),
        ("model FLOPs utilisation", mean("mfu")),
        ("peak memory, GiB", mean("mem_gib")),
        ("share of real tokens in a batch", mean("fill")),
        ("trainable parameters", records[-1].get("trainable_parameters")),
        ("parameters, frozen ones included", records[-1].get("parameters")),
        ("steps not applied", float(sum(record.get("skipped", 0) for record in records))),
    ]
    boxes = [
        f"<div><b>{number(value)}</b><span>{escape(name)}</span></div>"
        for name, value in shown
        if value is not None and math.isfinite(value)
    ]
    return f'<div class="numbers">{"".join(boxes)}</div>'


def _sample(sample: Record) -> str:
    prompt = str(sample.get("prompt", ""))
    return f"<pre><b>{escape(prompt)}</b>{escape(str(sample.get('text', '')))}</pre>"


def _config(config: Mapping[str, Any]) -> str:
    sections = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    rest = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    blocks = []
    for title, values in [*sections.items(), ("other", rest)]:
        rows = "".join(
            f"<tr><td>{escape(str(key))}</td><td>{escape(_plain(value))}</td></tr>"
            for key, value in values.items()
        )
        blocks.append(f"<section><h3>{escape(title)}</h3><table>{rows}</table></section>")
    return f'<div class="config">{"".join(blocks)}</div>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def main() -> int:
    """Command line: write the report of a run again."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_jax.training.report", description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--samples", help="JSONL with prompt and text, as infer.py writes it")
    arguments = parser.parse_args(sys.argv[1:])
    print(write_report(arguments.run, arguments.samples))
    return 0


if __name__ == "__main__":
    run_main(main)
