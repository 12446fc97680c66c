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

import numpy as np

from dsv3_jax.config import load_yaml
from dsv3_jax.errors import ConfigError, run_main
from dsv3_jax.training.charts import WIDTH, Series, heat_map, line_chart, number, smoothed
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
    cards = [_card("Loss (nats per token)", _loss(records), "wide")] if records else []
    if records:
        cards += [
            _card("Learning rate", line_chart([_series(records, "lr", "learning rate")], zero=True)),
            _card(
                "Gradient norm, before clipping",
                line_chart(_smooth(records, "grad_norm", "gradient norm"), log=True),
            ),
            _card(
                "Throughput (tokens per second)",
                line_chart(_smooth(records, "tokens_per_s", "tokens/s"), zero=True),
            ),
        ]
        if "maxvio" in records[-1]:
            cards += [
                _card(
                    "MaxVio: largest expert load over the mean, minus 1",
                    line_chart(_smooth(records, "maxvio", "mean over layers"), zero=True),
                ),
                _card(
                    "Router entropy (nats per token)",
                    line_chart([_series(records, "router_entropy", "mean over layers")]),
                ),
                _balance_card(records),
            ]
        cards += _heat_card(records, config)
    if samples:
        cards.append(_card("Samples", "".join(_sample(sample) for sample in samples), "wide"))
    cards.append(_card("Configuration", _config(config), "wide"))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}</title><style>{_STYLE.read_text()}</style>"
        f'<h1>{escape(name)}</h1><p class="sub">{_subtitle(records, config)}</p>{_numbers(records)}'
        f'<div class="cards">{"".join(cards)}</div></html>\n'
    )


def _card(title: str, body: str, kind: str = "", note: str = "") -> str:
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="card {kind}"><h2>{escape(title)}</h2>{text}{body}</div>'


def _series(records: Sequence[Record], key: str, name: str, color: int = 1, **style: Any) -> Series:
    have = [record for record in records if record.get(key) is not None]
    return Series(name, [record["step"] for record in have], [record[key] for record in have], color, **style)


def _smooth(records: Sequence[Record], key: str, name: str, color: int = 1) -> list[Series]:
    """The values, faint, and their running mean over a fiftieth of the run."""
    raw = _series(records, key, name, color)
    window = max(len(raw.values) // 50, 1)
    if window < 3:
        return [raw]
    mean = Series(name, raw.steps, smoothed(raw.values, window), color)
    return [Series(name, raw.steps, raw.values, color, faint=True), mean]


def _loss(records: Sequence[Record]) -> str:
    lines = _smooth(records, "ce_loss", "training, next token")
    if records[-1].get("mtp_loss"):
        lines += _smooth(records, "mtp_loss", "training, multi-token module", 2)
    lines.append(_series(records, "val_loss", "held-out", 3, dots=True))
    return line_chart(lines, width=2 * WIDTH, height=320)


def _balance_card(records: Sequence[Record]) -> str:
    return _card(
        "Sequence-wise balance loss, before its weight",
        line_chart(_smooth(records, "balance_loss", "sum over layers")),
    )


def _heat_card(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
    have = [record for record in records if record.get("expert_counts")]
    if not have:
        return []
    last = have[-max(len(have) // 20, min(len(have), 10)) :]
    load_LE = np.mean([record["expert_counts"] for record in last], axis=0)
    depth = config["model"].get("num_nextn_predict_layers", 0)
    main = load_LE.shape[0] - depth
    first = config["model"].get("num_hidden_layers", main) - main
    names = [f"layer {first + row}" for row in range(main)] + [f"mtp {k}" for k in range(depth)]
    note = (
        f"tokens of each expert over the mean of its layer, steps {last[0]['step']:,} to {last[-1]['step']:,}"
    )
    return [_card("Expert load", heat_map(load_LE, names), "wide", note)]


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
        ("MaxVio", mean("maxvio")),
        ("tokens per second", mean("tokens_per_s")),
        ("share of real tokens in a batch", mean("fill")),
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
