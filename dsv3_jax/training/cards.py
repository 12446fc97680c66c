"""The cards of the report page, each a title and a chart of what metrics.jsonl holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dsv3_jax.training.charts import Series, line_chart, smoothed
from dsv3_jax.training.heat import frame_count, heat_over_time
from dsv3_jax.training.histogram import histogram
from dsv3_jax.training.metrics import Record


def card(title: str, body: str, kind: str = "", note: str = "") -> str:
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="card {kind}"><h2>{escape(title)}</h2>{text}{body}</div>'


def series(records: Sequence[Record], key: str, name: str, color: int = 1, **style: Any) -> Series:
    have = [record for record in records if record.get(key) is not None]
    return Series(name, [record["step"] for record in have], [record[key] for record in have], color, **style)


def smooth(records: Sequence[Record], key: str, name: str, color: int = 1) -> list[Series]:
    """The values, faint, and their running mean over a fiftieth of the run."""
    raw = series(records, key, name, color)
    window = max(len(raw.values) // 50, 1)
    if window < 3:
        return [raw]
    mean = Series(name, raw.steps, smoothed(raw.values, window), color)
    return [Series(name, raw.steps, raw.values, color, faint=True), mean]


def throughput(records: Sequence[Record]) -> list[Series]:
    """Tokens over seconds in a window of a fiftieth of the run: the mean of the seconds of a token, not of rates.

    A step whose metrics came late makes the next one seem far too fast: such a pair counts as what it took together.
    """
    rates = series([r for r in records if r.get("tokens_per_s")], "tokens_per_s", "tokens/s")
    mean = smoothed([1 / rate for rate in rates.values], max(len(rates.values) // 50, 1))
    return [Series(rates.name, rates.steps, [1 / seconds for seconds in mean])]


def optimizer_cards(records: Sequence[Record]) -> list[str]:
    """Learning rate and gradient norm."""
    return [
        card("Learning rate", line_chart([series(records, "lr", "learning rate")], zero=True)),
        card(
            "Gradient norm, before clipping",
            line_chart(smooth(records, "grad_norm", "gradient norm"), log=True),
        ),
    ]


def machine_cards(records: Sequence[Record]) -> list[str]:
    """Throughput, the time of a step, memory."""
    cards = [
        card(
            "Throughput (tokens per second)",
            line_chart(throughput(records), zero=True),
        )
    ]
    # The first step of a process holds its compilation.
    seconds = [record["seconds"] for record in records[1:] if record.get("seconds") is not None]
    if seconds:
        cards.append(card("Time of a step", histogram(seconds, "seconds")))
    if any(record.get("mem_gib") is not None for record in records):
        note = "of the busiest device; of the process where devices do not report it"
        memory = line_chart([series(records, "mem_gib", "peak so far")], zero=True)
        cards.append(card("Peak memory (GiB)", memory, note=note))
    return cards


def multi_token_cards(records: Sequence[Record]) -> list[str]:
    """How often the multi-token module's draft holds on held-out text; nothing for a run without."""
    if not any(record.get("val_mtp_acceptance") is not None for record in records):
        return []
    lines = [
        series(records, "val_mtp_acceptance", "is the main model's own choice (accepted)", 2, dots=True),
        series(records, "val_mtp_accuracy", "is the text's token", 3, dots=True),
    ]
    note = "share of held-out places where the most probable token at depth 1 ..."
    return [card("Multi-token module: drafts", line_chart(lines, zero=True), note=note)]


def expert_cards(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
    """Load, biases and entropy of the router; nothing for a model without experts."""
    if "maxvio" not in records[-1]:
        return []
    cards = [
        card(
            "MaxVio: largest expert load over the mean, minus 1",
            line_chart(smooth(records, "maxvio", "mean over layers"), zero=True),
        )
    ]
    if any(record.get("balanced_fraction") is not None for record in records):
        cards.append(
            card(
                "Share of experts within ±50 % of their layer's mean load",
                line_chart(smooth(records, "balanced_fraction", "mean over layers"), zero=True),
            )
        )
    cards += _bias_cards(records)
    cards += [
        card(
            "Dead experts: without a token in the step",
            line_chart([series(records, "dead_experts", "all layers")], zero=True),
        ),
        card(
            "Router entropy (nats per token)",
            line_chart([series(records, "router_entropy", "mean over layers")]),
        ),
        card(
            "Sequence-wise balance loss, before its weight",
            line_chart(smooth(records, "balance_loss", "sum over layers")),
        ),
    ]
    return cards + _heat_card(records, config)


def _bias_cards(records: Sequence[Record]) -> list[str]:
    have = [record for record in records if record.get("bias_std")]
    if not have:
        return []
    ends = [
        series(have, "bias_max", "largest of all layers", 1),
        series(have, "bias_min", "smallest of all layers", 2),
    ]
    steps = [record["step"] for record in have]
    spread_SL = np.asarray([record["bias_std"] for record in have])
    lines = [Series("mean over layers", steps, list(spread_SL.mean(axis=1)), 1)]
    if spread_SL.shape[1] > 1:
        lines.append(Series("widest layer", steps, list(spread_SL.max(axis=1)), 2))
        lines.append(Series("narrowest layer", steps, list(spread_SL.min(axis=1)), 3))
    return [
        card("Selection bias of the experts", line_chart(ends)),
        card("Spread of the bias within a layer (standard deviation)", line_chart(lines, zero=True)),
    ]


def _heat_card(records: Sequence[Record], config: Mapping[str, Any]) -> list[str]:
    have = [record for record in records if np.size(record.get("expert_counts", ()))]
    if not have:
        return []
    depth = config["model"].get("num_nextn_predict_layers", 0)
    L, E = have[-1]["expert_counts"].shape
    main = L - depth
    first = config["model"].get("num_hidden_layers", main) - main
    names = [f"layer {first + row}" for row in range(main)] + [f"mtp {k}" for k in range(depth)]
    frames = []
    for part in np.array_split(np.arange(len(have)), frame_count(L, E, len(have))):
        load_LE = np.mean([have[at]["expert_counts"] for at in part], axis=0)
        frames.append((f"steps {have[part[0]]['step']:,} to {have[part[-1]]['step']:,}", load_LE))
    note = f"tokens of each expert over the mean of its layer, {frames[-1][0]}"
    if len(frames) > 1:
        note = "tokens of each expert over the mean of its layer; the slider goes through the run"
    return [card("Expert load", heat_over_time(frames, names), "wide", note)]
