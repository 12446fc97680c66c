"""metrics.jsonl, the step line, and the report page made of nothing else."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import dump_yaml, to_mapping
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.model.counts import flops_per_token, leaves, train_flops_per_token
from dsv3_jax.training import metrics
from dsv3_jax.training.cards import throughput
from dsv3_jax.training.charts import Series, line_chart, nice_ticks, number, smoothed
from dsv3_jax.training.heat import frame_count, heat_map, heat_over_time
from dsv3_jax.training.histogram import histogram
from dsv3_jax.training.metrics import MetricsLog, Speed, read_metrics, record_of, step_line
from dsv3_jax.training.report import write_report
from tests.training import tiny


def test_the_last_line_of_a_step_counts_and_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step, loss in ((1, 0.1), (2, float("nan")), (3, 3.0)):
        log.write({"step": step, "loss": loss})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "lo')
    log = MetricsLog(path)
    log.write({"step": 3, "loss": 1 / 3})
    log.close()
    records = read_metrics(path)
    assert records == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": None}, {"step": 3, "loss": 1 / 3}]
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected a JSON object"):
        read_metrics(path)


def test_half_a_line_is_found_from_the_end_however_long_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    for block in (1, 7, 1 << 16):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        for whole in (b"", b'{"step": 1}\n', b'{"step": 1}\n{"step": 2}\n'):
            for rest in (b"", b"{", b'{"step": 3, "loss": 3.25}'):
                path.write_bytes(whole + rest)
                MetricsLog(path).close()
                assert path.read_bytes() == whole, (block, rest)


def test_expert_counts_are_read_as_arrays(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_record(1)) + "\n" + json.dumps(_record(2)))
    [record] = read_metrics(path)
    assert record["expert_counts"].dtype == np.int32 and record["step"] == 1
    np.testing.assert_array_equal(record["expert_counts"], [[1, 0, 3], [2, 2, 0]])


def _record(step: int) -> dict[str, Any]:
    values = {
        "loss": np.float32(3.211),
        "ce_loss": np.float32(3.0),
        "mtp_loss": np.float32(3.1),
        "balance_loss": np.float32(2.0),
        "grad_norm": np.float32(0.8125),
        "lr": np.float32(2.9e-4),
        "skipped": np.int32(0),
        "maxvio": np.float32(0.21),
        "router_entropy": np.float32(2.0),
        "expert_counts_LE": np.array([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0]], np.float32),
        "balanced_fraction": np.float32(1 / 3),
        "bias_min": np.float32(-0.25),
        "bias_max": np.float32(0.5),
        "bias_std_L": np.array([0.125, 0.25], np.float32),
    }
    timed = {"tokens_per_s": 41203.0, "seconds": 0.5, "tflops": 8.1, "mfu": 0.41, "mem_gib": 31.2}
    return record_of(step, values) | {"tokens": 4 * step} | timed


def test_step_line_and_record() -> None:
    record = _record(120)
    assert record["loss"] == float(np.float32(3.211)) and record["dead_experts"] == 2
    assert record["expert_counts"] == [[1, 0, 3], [2, 2, 0]]
    assert record["bias_std"] == [0.125, 0.25]
    assert step_line(record, 1000, 252.0) == (
        "step 00120/01000 (12.0%) | loss 3.211 | lr 2.9e-4 | gnorm 0.81 | 41,203 tok/s | 8.1 TFLOP/s (mfu 41.0%) | "
        "maxvio 0.21 | mem 31.2GiB | eta 4.2m"
    )
    # Where the peak is not known there is no share of it; a small rate keeps two digits.
    small = {key: value for key, value in record.items() if key != "mfu"} | {"tflops": 0.0123}
    assert "tok/s | 0.012 TFLOP/s | maxvio" in step_line(small, 1000, 252.0)


def test_report_is_one_well_formed_page_from_metrics_and_config_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_yaml(to_mapping(tiny.RUN)))
    records = [_record(step) for step in range(1, 301)]
    records[40]["loss"] = records[40]["ce_loss"] = None  # a step that was not finite
    records[299] |= {"val_loss": 2.5, "val_mtp_acceptance": 0.75, "val_mtp_accuracy": 0.5}
    records[150]["seconds"] = 9.0  # a pause
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "<b>", "text": "a < b & c"}) + "\n")
    page = write_report(tmp_path).read_text()
    for text in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Expert load",
        "MaxVio",
        "Share of experts within",
        "Selection bias",
        "Spread of the bias",
        "Dead experts",
        "drafts",
        "Peak memory",
        "Time of a step",
        'type="range"',
        "held-out",
        "q_lora_rank",
    ):
        assert text in page, text
    assert "&lt;b&gt;" in page and "a &lt; b &amp; c" in page
    assert "src=" not in page and "href=" not in page and "url(" not in page and "@import" not in page
    svgs = page.split("<svg")[1:]
    assert len(svgs) == 15
    for svg in svgs:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_charts_leave_out_what_is_not_finite_and_have_round_ticks() -> None:
    chart = line_chart([Series("loss", [1, 2, 3, 4], [1.0, float("nan"), None, 2.0])])  # type: ignore[list-item]
    points = chart.split('points="')[1].split('"')[0].split()
    assert len(points) == 2 and "nan" not in chart
    assert line_chart([]) == '<p class="none">nothing recorded</p>'
    assert nice_ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert (number(12300.0), number(0.0), number(3e-4), number(0.25)) == ("12,300", "0", "3.0e-4", "0.25")
    np.testing.assert_allclose(smoothed([1.0, 2.0, None, 4.0, 5.0], 3), [1.0, 1.5, 3.0, 4.5, 5.0])  # type: ignore[list-item]


def test_throughput_is_tokens_over_time_where_one_step_is_late_and_the_next_early() -> None:
    """Of 150 steps of 100 tokens in 0.1 s each, one is told 0.19 s and the next 0.01 s: 1,000 tokens/s all the same."""
    seconds = [0.1] * 150
    seconds[70:72] = [0.19, 0.01]
    records = [{"step": i, "tokens_per_s": 100 / s} for i, s in enumerate(seconds)]
    (line,) = throughput([*records, {"step": 150, "tokens_per_s": 0.0}])
    assert line.steps == list(range(150))
    np.testing.assert_allclose(
        np.delete(line.values, [69, 72]), 1000
    )  # windows of three that hold both or neither
    assert max(line.values) < 1500  # a mean of the rates would say 4,000


def test_a_report_of_older_metrics_leaves_out_what_they_lack(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_yaml(to_mapping(tiny.RUN)))
    new = ("balanced_fraction", "bias_min", "bias_max", "bias_std", "tflops", "mfu", "mem_gib")
    records = [{k: v for k, v in _record(step).items() if k not in new} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = write_report(tmp_path).read_text()
    assert "MaxVio" in page and "Selection bias" not in page and "Peak memory" not in page


def test_step_times_are_counted_in_bars_and_long_ones_told() -> None:
    svg = histogram([0.5] * 50 + [0.6] * 49 + [20.0], "seconds")
    bars = [int(part.split("</title>")[0].rpartition(": ")[2]) for part in svg.split("<title>")[1:]]
    assert sum(bars) == 99 and max(bars) == 50 and "1 of 100 above" in svg and "the longest 20" in svg
    assert histogram([], "seconds") == '<p class="none">nothing recorded</p>'


def test_speed_is_the_model_s_operations_and_their_share_of_the_known_peak() -> None:
    speed = Speed(tiny.MODEL, 16, tiny.mesh(2, 2, 2))
    flops = train_flops_per_token(tiny.MODEL, 16)
    assert speed.of(1000.0) == {"tflops": flops * 1000.0 / 1e12}  # a CPU's peak is not known
    gpus = SimpleNamespace(devices=np.full((2, 4), SimpleNamespace(device_kind="NVIDIA H200")), size=8)
    record = Speed(tiny.MODEL, 16, gpus).of(1e9)  # type: ignore[arg-type]
    assert record["mfu"] == pytest.approx(flops * 1e9 / (8 * 989.4e12))


def test_operations_of_training_are_six_for_each_active_weight_and_the_attention() -> None:
    # Multi-token module: its matrices but a copy of the embedding, its experts by their share, the shared head.
    cfg, T = tiny.MODEL, 16
    without = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    base = flops_per_token(without, leaves(without), T)["train"]
    assert train_flops_per_token(without, T) == pytest.approx(base)
    D, H, A, C, R, N, U, F, E, K = 32, 2, 16, 16, 4, 8, 8, 16, 8, 2
    attention = A * D + H * (N + R) * A + (C + R) * D + H * (N + U) * C + D * H * U
    block = attention + E * D + (K + 1) * 3 * D * F
    extra = 2 * (2 * D * D + block + cfg.vocab_size * D) + 2 * H * (N + R + U) * (T + 1) / 2
    assert train_flops_per_token(cfg, T) == pytest.approx(base + 3 * extra)


def test_heat_map_colours_show_load_over_the_mean() -> None:
    svg = heat_map(np.array([[0.0, 1.0, 2.0]]), ["layer 0"])
    assert "expert 0: 0.00 x mean" in svg and "expert 2: 2.00 x mean" in svg
    fills = [part.split('"')[0] for part in svg.split('fill="')[1:4]]
    assert fills == ["#3168ba", "#e2e4e6", "#c6392d"]


def test_the_slider_carries_every_frame_in_levels_and_loads_nothing() -> None:
    loads = [np.array([[0.0, 1.0, 2.0]]), np.array([[1.0, 1.0, 1.0]]), np.array([[9.0, 0.0, 0.0]])]
    html = heat_over_time([(f"steps {n}", load) for n, load in enumerate(loads)], ["layer 0"])
    data = json.loads(html.split('<script type="application/json">')[1].split("</script>")[0])
    assert [frame["loads"] for frame in data["frames"]] == ["0iz", "iii", "z00"]
    assert (data["colors"][0], data["colors"][35]) == ("#3168ba", "#c6392d") and 'max="2" value="2"' in html
    assert "expert 0: 3.00 x mean" in html and "http" not in html  # the last frame is the one drawn
    assert "<input" not in heat_over_time([("steps 1 to 3", loads[0])], ["layer 0"])
    assert (frame_count(4, 32, 500), frame_count(58, 256, 10**6), frame_count(3, 8, 6)) == (24, 24, 1)
