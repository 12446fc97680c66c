"""A kernel's implementation is chosen by name, or by device, arguments and evidence; a wrong choice is refused."""

import json
import logging

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.kernels import shim, tables
from dsv3_jax.kernels.registry import Implementation, call, mosaic, resolve


def fast(x):
    return "fast"


def slow(x):
    return "slow"


def refuses(x):
    return f"width {x.shape[-1]} is not a multiple of 64" if x.shape[-1] % 64 else None


def shape_class(x):
    return f"w{x.shape[-1]}-{x.dtype.name}"


AVAILABLE = {
    "gpu_only": Implementation(fast, platforms=frozenset({"gpu"})),
    "reference": Implementation(slow),
}
KERNELS = {
    "mosaic": mosaic(fast, refuses=refuses, shape_class=shape_class),
    "reference": Implementation(slow),
}
WIDE, ODD = jax.ShapeDtypeStruct((3, 128), jnp.bfloat16), jax.ShapeDtypeStruct((3, 100), jnp.bfloat16)


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """Tables that hold what a test puts into them."""

    def write(verified=None, tuning=None):
        for name, table in (("VERIFIED", verified), ("TUNING", tuning)):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(table or {}))
            monkeypatch.setattr(tables, name, path)
        tables.read.cache_clear()

    yield write
    tables.read.cache_clear()


def test_auto_takes_the_first_that_can_run_and_says_so_once(caplog):
    with caplog.at_level(logging.INFO, logger="dsv3_jax.kernels.registry"):
        assert resolve("said_once", "auto", AVAILABLE, WIDE) is slow
        assert resolve("said_once", "auto", AVAILABLE, WIDE) is slow
    assert [r.getMessage() for r in caplog.records] == [
        "kernel said_once: implementation 'reference' on platform cpu"
    ]


def test_a_named_implementation_is_taken():
    assert resolve("k", "reference", AVAILABLE, WIDE) is slow
    assert call("k", "reference", AVAILABLE, WIDE) == "slow"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no implementation 'fast'; known: auto, gpu_only, reference"):
        resolve("k", "fast", AVAILABLE, WIDE)


def test_a_name_that_cannot_run_here_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="'gpu_only' cannot run: it runs on gpu, not on cpu"):
        resolve("k", "gpu_only", AVAILABLE, WIDE)


def test_auto_without_any_that_can_run_gives_every_reason():
    with pytest.raises(ValueError, match="gpu_only: it runs on gpu, not on cpu"):
        resolve("k", "auto", {"gpu_only": AVAILABLE["gpu_only"]}, WIDE)


def test_a_kernel_written_for_hopper_is_refused_on_another_gpu():
    with shim.compiling_for("NVIDIA A100-SXM4-80GB", 108):
        assert resolve("k", "auto", KERNELS, WIDE) is slow
        with pytest.raises(ValueError, match=r"it runs on .*H200.*, not on A100-SXM4-80GB"):
            resolve("k", "mosaic", KERNELS, WIDE)


def test_arguments_that_a_kernel_refuses_never_reach_it():
    with (
        shim.compiling_for("NVIDIA H200"),
        pytest.raises(ValueError, match="width 100 is not a multiple of 64"),
    ):
        resolve("k", "mosaic", KERNELS, ODD)


def test_auto_takes_a_kernel_only_where_a_committed_run_shows_it_correct(evidence, caplog):
    evidence(verified={"H200": {"k": {"mosaic": {"w128-bfloat16": {"error": 0.001}}}}})
    with shim.compiling_for("NVIDIA H200"):
        assert resolve("k", "auto", KERNELS, WIDE) is fast
        assert resolve("k", "auto", KERNELS, jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)) is slow
        assert resolve("k", "auto", KERNELS, ODD) is slow
    with caplog.at_level(logging.INFO), shim.compiling_for("NVIDIA H100 80GB HBM3"):
        assert resolve("not_shown", "auto", KERNELS, WIDE) is slow
    assert "no committed run on H100 shows it correct for w128-bfloat16" in caplog.text


def test_a_named_kernel_needs_no_such_run(evidence):
    evidence()
    with shim.compiling_for("NVIDIA H200"):
        assert resolve("k", "mosaic", KERNELS, WIDE) is fast


@pytest.mark.skipif(shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret()))
def test_interpreted_a_kernel_runs_on_any_platform():
    with shim.interpret():
        assert resolve("k", "mosaic", KERNELS, WIDE) is fast


@pytest.mark.skipif(shim.why_not_interpret() is None, reason="this jax can interpret")
def test_a_jax_that_cannot_interpret_says_so():
    with pytest.raises(ValueError, match=r"knows no layouts; 0.11 or later"):
        shim.interpret()


class TestTables:
    from typing import NamedTuple

    class Tiles(NamedTuple):
        rows: int = 64
        stages: int = 2

    def test_the_committed_tables_hold_only_known_devices(self):
        for path in (tables.VERIFIED, tables.TUNING):
            assert set(tables.read(path)) <= {"H100", "H200", "H800", "H20", "GH200", "cpu"}

    def test_tile_parameters_come_from_the_table_of_the_device(self, evidence):
        evidence(tuning={"H200": {"k_forward": {"w128": {"rows": 128}}}})
        with shim.compiling_for("NVIDIA H200"):
            assert tables.tuned("k_forward", "w128", self.Tiles()) == (128, 2)
            assert tables.tuned("k_forward", "w64", self.Tiles()) == (64, 2)
        assert tables.tuned("k_forward", "w128", self.Tiles()) == (64, 2)

    def test_an_entry_that_the_kernel_does_not_know_is_refused(self, evidence):
        evidence(tuning={"H200": {"k": {"w128": {"block": 128}}}})
        with (
            shim.compiling_for("NVIDIA H200"),
            pytest.raises(ValueError, match=r"\['block'\]; known: rows, stages"),
        ):
            tables.tuned("k", "w128", self.Tiles())

    def test_a_watch_sees_what_was_asked_and_answers_instead(self, evidence):
        evidence(tuning={"H200": {"k": {"w128": {"rows": 128}}}})
        with shim.compiling_for("NVIDIA H200"):
            with tables.watching({"k": {"rows": 256}}) as watch:
                assert tables.tuned("k", "w128", self.Tiles()) == (256, 2)
                resolve("k", "mosaic", KERNELS, WIDE)
            assert watch.programs == {"k": "w128"}
            assert watch.kernels == {("k", "mosaic"): "w128-bfloat16"}
            assert tables.tuned("k", "w128", self.Tiles()) == (128, 2)
