"""The benchmarks of a GPU as far as a CPU can run them: no line of them is a first run when a GPU comes."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernel_tables, tune
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import decode, fp8, kernels, quantized, rivals, timing, train
from benchmarks.gpu.ceilings import ceilings
from dsv3_jax.errors import ConfigError
from dsv3_jax.kernels import tables
from dsv3_jax.kernels.cases import Case, all_cases
from dsv3_jax.kernels.registry import Implementation, call

PEAKS = {"bytes_per_s": 1e10, "flops_per_s": 1e11}


class Tiles(NamedTuple):
    rows: int = 2
    wrong: int = 0


def tiled(x):
    """x + 1 through tile parameters, one of which spoils the result."""
    tiles = tables.tuned("toy_forward", "toy", Tiles())
    parts = x.reshape(tiles.rows, -1) + 1
    return parts.reshape(x.shape) + tiles.wrong


TOY = {
    "mosaic": Implementation(tiled, shape_class=lambda x: f"w{x.shape[-1]}"),
    "spoilt": Implementation(lambda x: x + jnp.nan),
    "gpu_only": Implementation(tiled, platforms=frozenset({"gpu"})),
    "reference": Implementation(lambda x: x + 1),
}


def toy(**changes) -> Case:
    fields = dict(
        kernel="toy",
        program="forward",
        shape="one",
        size="small",
        function=lambda x, *, implementation: call("toy", implementation, TOY, x),
        arguments=(jax.ShapeDtypeStruct((4, 64), jnp.float32),),
        flops=256.0,
        bytes=2048.0,
        bound=1e-5,
        implementations=("mosaic", "spoilt", "gpu_only", "reference"),
        tiles={"toy_forward": [{"rows": 4}, {"rows": 3}, {"wrong": 1}]},
    )
    return Case(**(fields | changes))


def test_cases_have_names_of_their_own_and_arrays_as_they_say():
    cases = all_cases()
    names = [(case.name, case.size) for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        if case.size == "small":
            arrays = case.make(jax.random.key(0))
            assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in case.arguments], (
                case.name
            )


def test_an_implementation_is_right_wrong_or_refused_and_only_a_right_one_is_timed():
    row = kernels.run_case(toy(), 1, 3, PEAKS, with_rivals=True)
    found = row["implementations"]
    assert found["mosaic"]["right"] and found["mosaic"]["time"]["median"] > 0
    assert found["mosaic"]["of_copy"] == pytest.approx(
        2048 / (1e-3 * found["mosaic"]["time"]["median"]) / PEAKS["bytes_per_s"]
    )
    assert found["spoilt"]["error"] == float("inf") and "time" not in found["spoilt"]
    assert "it runs on gpu, not on cpu" in found["gpu_only"]["refused"]
    assert any("WRONG" in line for line in kernels.lines(row))


def test_a_failure_of_the_device_is_a_wrong_result_and_not_the_end():
    """As a kernel that the driver does not load, or that TMA does not take."""

    def fails(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: an illegal address\nmore")

    def cannot_lower(x):
        raise ValueError("a box that TMA does not take")

    implementations = {"mosaic": Implementation(fails), "spoilt": Implementation(cannot_lower)}
    case = toy(
        function=lambda x, *, implementation: call("toy", implementation, TOY | implementations, x),
        implementations=("mosaic", "spoilt", "reference"),
    )
    row = kernels.run_case(case, 1, 1, PEAKS, with_rivals=False)
    found = row["implementations"]
    assert found["mosaic"]["failed"] == "INTERNAL: an illegal address" and found["reference"]["right"]
    assert any("FAILED, a box" in line for line in kernels.lines(row))
    by = {"by": {"bfloat16": {"right": True}, "mosaic": kernels.failed(ValueError("no"))}, "shape": "v3_o"}
    wrong = command.wrong_ones({"kernels": [row], "fp8": [by], "quantized": [by | {"format": "int4"}]})
    assert wrong == [
        "toy forward one mosaic",
        "toy forward one spoilt",
        "fp8 v3_o mosaic",
        "quantized v3_o int4 mosaic",
    ]
    assert "mosaic" not in kernels.shown_correct([row]).get("toy", {})


def test_a_class_is_shown_correct_only_if_every_case_of_it_was_right():
    row = kernels.run_case(toy(), 1, 3, PEAKS, with_rivals=False)
    entry = {"error": 0.0, "bound": 1e-5, "cases": 1}
    assert kernels.shown_correct([row]) == {"toy": {"mosaic": {"w64": entry}}}
    bad = json.loads(json.dumps(row))
    bad["implementations"]["mosaic"]["right"] = False
    assert kernels.shown_correct([row, bad]) == {}


def test_a_record_adds_what_was_shown_and_takes_away_what_was_not(tmp_path, monkeypatch):
    path = tmp_path / "verified.json"
    stale = {"H200": {"toy": {"mosaic": {"w64": {"error": 0}, "w128": {"error": 0}}}}}
    path.write_text(json.dumps(stale))
    monkeypatch.setattr(tables, "VERIFIED", path)
    row = kernels.run_case(toy(), 1, 3, PEAKS, with_rivals=False)
    environment = {"family": "H200", "commit": "c", "device": "NVIDIA H200", "versions": {"jax": "0"}}
    command.record({"environment": environment, "kernels": [row]})
    assert json.loads(path.read_text())["H200"]["toy"]["mosaic"]["w64"]["device"] == "NVIDIA H200"
    row["implementations"]["mosaic"]["right"] = False
    command.record({"environment": environment, "kernels": [row]})
    assert list(json.loads(path.read_text())["H200"]["toy"]["mosaic"]) == ["w128"]


def test_small_cases_run_with_the_reference_within_their_bounds():
    cases = [case for case in all_cases() if case.size == "small"]
    assert cases
    for case in cases[:: max(1, len(cases) // 3)]:
        row = kernels.run_case(case, 3, 1, PEAKS, with_rivals=False)
        assert row["implementations"]["reference"]["right"], (case.name, row)


def test_times_and_ceilings_are_positive_and_inputs_rotate():
    assert timing.sets_for(1 << 20) == 16 and timing.sets_for(64 << 20) == 2 and timing.sets_for(1 << 35) == 1
    seen = []
    sets = [(np.float32(1),), (np.float32(2),)]
    result = timing.timed(lambda x: seen.append(float(x)) or x, sets, 4)
    assert {1.0, 2.0} == set(seen) and result.calls == 4 and result.method == "calls"
    peaks = ceilings(small=True)
    assert peaks["bytes_per_s"] > 0 and peaks["flops_per_s"] > 0


@pytest.mark.slow
def test_whole_programs_run_at_tiny_sizes():
    found = train.run(True, ("reference",), 1, rival=False)
    assert found["ours"]["reference"]["tokens_per_s"] > 0
    rows = decode.run(True, ("reference",), 1, PEAKS)["rows"]
    assert [row["batch"] for row in rows] == [2]
    assert all(row["tokens_per_s"] > 0 and row["ceiling_tokens_per_s"] > 0 for row in rows)


def test_fp8_against_bfloat16_on_a_cpu():
    """What can run here is right; the rest says why not, down to the table."""
    rows = fp8.run(True, 1)
    assert [row["shape"] for row in rows] == ["interpret", "interpret_experts"]
    for row in rows:
        assert row["by"]["bfloat16 reference"]["tflops"] > 0 and row["by"]["bfloat16 reference"]["error"] == 0
        assert "it runs on gpu" in row["by"]["fp8 mosaic"]["refused"]
    assert rivals.why_not() == rows[0]["by"]["torch scaled_mm, product alone"]["refused"]
    assert "bfloat16 reference" in fp8.lines(rows)


def test_fp8_is_within_the_benchmarks_bound_of_bfloat16():
    shape = fp8.SHAPES["interpret_experts"]
    x, codes, scales, sizes = fp8.inputs(jax.random.key(0), shape=shape)
    wanted = fp8._bfloat16(x, fp8._values(codes, scales, shape), sizes, name="reference")
    found = fp8.fp8(x, codes, scales, sizes, implementation="reference")
    assert 1e-3 < kernels.error_of(found, wanted) < fp8.BOUND


def test_quantised_decoding_on_a_cpu():
    """What can run here is right and timed against the floor; the rest says why not, down to the table."""
    rows = quantized.measure(True, 1, PEAKS)
    assert [(row["format"], row["rows"]) for row in rows] == [(f, 16) for f in ("int4", "int8", "fp8")]
    for row in rows:
        assert row["by"]["reference"]["of_floor"] > 0 and row["by"]["bfloat16"]["of_bfloat16"] == 1
        assert "it runs on gpu" in row["by"]["mosaic"]["refused"]
        assert row["floor_ms"] == pytest.approx(1e3 * row["bytes"] / PEAKS["bytes_per_s"], rel=1e-3)
    # Codes and scales of 192 x 512, x and y.
    assert rows[0]["bytes"] == 192 * 256 + 4 * 192 * 4 + 2 * 16 * (512 + 192)
    assert rows[0]["by"][quantized.TORCH]["refused"] == rivals.why_not()
    assert quantized.TORCH not in rows[1]["by"] and "of the floor" in quantized.lines(rows)


def test_torchs_int4_product_gets_the_same_weight():
    pytest.importorskip("torch")
    shape = quantized.SHAPES["interpret"]
    sets = [quantized.inputs(jax.random.key(1), shape, "int4")]
    x, *parts = sets[0]
    wanted = quantized.run(
        x.astype(jnp.float32), *parts, shape=shape, text="int4", implementation="reference"
    )
    found = quantized._torch(sets, wanted, shape, 1, "cpu")
    assert found.get("right") and found["time"]["median"] > 0, found


def test_without_a_gpu_nothing_is_measured_by_mistake(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    with pytest.raises(ConfigError, match="no GPU here"):
        command.main()
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu", "--dry-run", "--record"])
    with pytest.raises(ConfigError, match="--record needs a run on a GPU"):
        command.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_same_model_trains_in_transformers():
    pytest.importorskip("transformers")
    row = train.theirs(train.MODEL_TINY, 2, 32, 1, "cpu")
    # Nearly uniform at the first step, as ours.
    assert row["tokens_per_s"] > 0 and abs(row["loss"] - np.log(train.MODEL_TINY.vocab_size)) < 0.2


class TestTuning:
    def test_the_fastest_right_candidate_is_found(self, monkeypatch):
        speeds = {"{}": 1.0, "{'rows': 4}": 0.5, "{'wrong': 1}": 0.1}
        real = tune.attempt

        def attempt(case, implementation, sets, instead, wanted, calls):
            result, spent, watch = real(case, implementation, sets, instead, wanted, calls)
            return result, None if spent is None else speeds[str(dict(*instead.values()))], watch

        monkeypatch.setattr(tune, "attempt", attempt)
        found = tune.tune([toy()], "mosaic", 0.02, 1, time.monotonic() + 60)
        # rows = 3 does not divide and raises; wrong = 1 is faster and wrong.
        assert found == {("toy_forward", "toy"): (256.0, {"rows": 4})}

    def test_nothing_is_written_for_less_than_the_gain(self):
        found = tune.tune(
            [toy(tiles={"toy_forward": [{"rows": 2}]})], "mosaic", 0.999, 1, time.monotonic() + 60
        )
        assert found == {}

    def test_a_case_that_cannot_be_compiled_is_told_and_the_next_is_tried(self, capsys):
        def cannot(x, *, implementation):
            raise ValueError("a box that TMA does not take")

        cases = [toy(function=cannot, flops=1e3), toy(tiles={"toy_forward": []})]
        assert tune.tune(cases, "mosaic", 0.02, 1, time.monotonic() + 60) == {}
        assert "a box" in capsys.readouterr().out.splitlines()[0]

    def test_entries_are_merged_into_the_table(self, tmp_path):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps({"H100": {"a": {"b": {"rows": 1}}}}))
        tune.write({("toy_forward", "toy"): (1.0, {"rows": 4})}, "H200", path)
        assert json.loads(path.read_text()) == {
            "H100": {"a": {"b": {"rows": 1}}},
            "H200": {"toy_forward": {"toy": {"rows": 4}}},
        }


def test_rivals_say_why_they_cannot_run():
    case = toy(kernel="attention", program="forward")
    found = dict(rivals.run(case, [], None, 1, kernels.error_of))
    reason = rivals.why_not()
    assert reason is not None and set(found) >= {"torch sdpa", "torch flex"}
    assert all(row["refused"] == reason for row in found.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("kernel", "program"), sorted(rivals.RIVALS))
def test_torch_computes_the_same_as_the_reference(kernel, program, monkeypatch):
    pytest.importorskip("torch")
    name = "torch sdpa" if kernel == "attention" else "torch grouped_mm"
    # The others need a GPU, or compile C++ for minutes.
    monkeypatch.setattr(rivals, "RIVALS", {(kernel, program): {name: rivals.RIVALS[kernel, program][name]}})
    from dsv3_jax.kernels.attention import attention
    from dsv3_jax.kernels.grouped_matmul import grouped_matmul

    key = jax.random.split(jax.random.key(0), 4)
    if kernel == "attention":
        arrays = [jax.random.normal(k, (2, 16, 3, d)) for k, d in zip(key, (8, 8, 8, 8), strict=True)]
        run = lambda q, k, v: attention(q, k, v, scale=8**-0.5)  # noqa: E731
        pulled, count = (0, 1, 2), 3
    else:
        sizes = jnp.asarray([5, 0, 11], jnp.int32)
        arrays = [jax.random.normal(key[0], (16, 8)), jax.random.normal(key[1], (3, 16, 8)), sizes]
        arrays = [a if a.dtype == jnp.int32 else a.astype(jnp.bfloat16) for a in arrays]
        arrays.append(jax.random.normal(key[2], (16, 16), jnp.bfloat16))
        run, count = grouped_matmul, 3
        pulled = {"forward": (), "dx": (0,), "dw": (1,)}[program]
    if program == "forward":
        wanted, arrays = (run(*arrays[:count]),), arrays[:count]
    else:
        gradients = jax.vjp(run, *arrays[:count])[1](arrays[-1])
        wanted = tuple(gradients[i] for i in pulled)
    case = toy(kernel=kernel, program=program, arguments=tuple(arrays), bound=1e-2)
    found = dict(rivals.run(case, [tuple(arrays)], wanted, 1, kernels.error_of, device="cpu"))
    assert found[name].get("right"), found


def test_tables_say_what_was_not_measured_and_what_a_run_found(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tables, "RESULTS", tmp_path)
    assert kernel_tables.kernel_table() == "Kernels on a GPU: not measured."
    assert kernel_tables.fp8_table() == "FP8 matmul against bfloat16: not measured."
    assert kernel_tables.quantized_table() == "Decode products with quantised weights: not measured."
    assert kernel_tables.model_table().count("not measured") == 5
    row = kernels.run_case(toy(), 1, 3, PEAKS, with_rivals=False)
    environment = {
        "family": "H200",
        "commit": "c",
        "date": "d",
        "device": "NVIDIA H200",
        "versions": {"jax": "0"},
    }
    run = {"environment": environment, "ceilings": PEAKS, "kernels": [row], "not_begun": ["toy backward"]}
    (tmp_path / "gpu-h200.json").write_text(json.dumps(run))
    table = kernel_tables.kernel_table()
    assert "| H200 | toy forward one float32 | spoilt | wrong (bound 1e-05) |" in table
    assert "it runs on gpu, not on cpu" in table and "Not begun in the time: toy backward" in table
    drawn = kernel_tables.chart(run)
    # The right ones alone have bars: mosaic and reference.
    assert drawn.count("<rect") == 1 + 2 and "NVIDIA H200" in drawn
