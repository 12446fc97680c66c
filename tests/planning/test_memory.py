"""The memory model against the compiled step: state exact, temporaries within TOLERANCE, both in float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.cli import load_run_config
from dsv3_jax.config import MeshConfig, RunConfig
from dsv3_jax.parallel import make_mesh, mesh_shape
from dsv3_jax.planning.activations import Tokens
from dsv3_jax.planning.memory import abstract_mesh, memory
from dsv3_jax.planning.plan import BATCH_KEYS, Compiled, compile_step
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step
from tests.training.tiny import replace

# Measured: estimate / compiled, see docs/planning.md. XLA's schedule is not modelled.
TOLERANCE = 0.2
TINY = load_run_config(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")
CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "data 2 x fsdp 4, none": ({"data": 2, "fsdp": 4}, {"remat": "none", "batch_size": 8}),
    "fsdp 2 x expert 2, latents, two micro-batches": (
        {"fsdp": 2, "expert": 2},
        {"remat": "latents", "batch_size": 8, "accumulate": 2, "seq_len": 512},
    ),
}


def run_of(mesh: dict[str, int], training: dict[str, Any]) -> tuple[RunConfig, int]:
    """Run and devices; two expert layers and no multi-token module with experts on the mesh, which compiles sooner."""
    cfg = replace(dataclasses.replace(TINY, mesh=MeshConfig(**{"fsdp": 1, **mesh})), "training", **training)
    devices = 1
    for size in mesh.values():
        devices *= size
    if "expert" in mesh:
        cfg = replace(cfg, "model", num_hidden_layers=3, num_nextn_predict_layers=0)
    return cfg, devices


@functools.cache
def compiled(name: str) -> tuple[RunConfig, int, Compiled]:
    cfg, devices = run_of(*CASES[name])
    return cfg, devices, compile_step(cfg, devices)


@pytest.mark.parametrize("name", CASES)
def test_the_model_agrees_with_the_compiled_step(name: str) -> None:
    cfg, devices, program = compiled(name)
    need = memory(cfg, abstract_mesh(mesh_shape(cfg.mesh, devices)))
    assert need.arguments == program.argument_bytes
    assert need.temporary == pytest.approx(program.temporary_bytes, rel=TOLERANCE)


def scans(jaxpr: Any) -> Iterator[Any]:
    """Every scan of a traced program outside of other scans."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scans(inner)


def stacked_outputs(scan: Any) -> list[Any]:
    """Outputs of a scan equation that its body's have one axis less than: not its carry."""
    body = scan.params["jaxpr"].jaxpr.outvars
    return [
        out for out, one in zip(scan.outvars, body, strict=True) if len(out.aval.shape) > len(one.aval.shape)
    ]


@pytest.mark.parametrize(
    ("remat", "dtype"),
    [("full", "bfloat16"), ("latents", "float32"), ("latents", "bfloat16"), ("none", "bfloat16")],
)
def test_kept_activations_are_what_the_traced_program_stacks(remat: str, dtype: str) -> None:
    """The forward scans over layers give their residuals as outputs; in bfloat16 too, where no compiler is asked."""
    cfg = replace(replace(TINY, "training", remat=remat), "model", dtype=dtype, num_nextn_predict_layers=0)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    batch = {
        key: jax.ShapeDtypeStruct(
            (cfg.training.batch_size, cfg.training.seq_len), jnp.int32, sharding=batch_sharding(mesh)
        )
        for key in BATCH_KEYS
    }
    traced = jax.make_jaxpr(make_train_step(cfg, mesh))(abstract_state(cfg, mesh), batch)
    T, K, D = cfg.training.seq_len, cfg.model.num_experts_per_tok, cfg.model.hidden_size
    stacked = sum(
        out.aval.size * out.aval.dtype.itemsize
        for scan in scans(traced.jaxpr)
        if not scan.params["reverse"] and scan.outvars[0].aval.shape == (1, T, D)
        for out in stacked_outputs(scan)
        if {T, T * K} & set(out.aval.shape)
    )
    if remat == "latents":  # attention_out is stacked twice; XLA finds the two outputs of the loop equal
        model = cfg.model
        width = model.num_attention_heads * model.v_head_dim * jnp.dtype(dtype).itemsize
        stacked -= model.num_hidden_layers * T * width
    tokens = Tokens(cfg, mesh)
    final_norm = tokens.n * tokens._norm(D)
    assert tokens.kept() - final_norm == pytest.approx(stacked, rel=0.06)


def test_a_smaller_policy_keeps_less_and_bfloat16_halves_it() -> None:
    cfg, devices = run_of({"data": 2, "fsdp": 4}, {"batch_size": 8})
    mesh = abstract_mesh(mesh_shape(cfg.mesh, devices))
    kept = [Tokens(replace(cfg, "training", remat=r), mesh).kept() for r in ("none", "latents", "full")]
    assert kept == sorted(kept, reverse=True)
    full = replace(cfg, "training", remat="full")
    half = Tokens(replace(full, "model", dtype="bfloat16"), mesh).kept()
    assert half < Tokens(full, mesh).kept()
    assert memory(replace(cfg, "training", accumulate=1), mesh).arguments == memory(cfg, mesh).arguments
