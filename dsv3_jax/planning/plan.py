"""A plan: the real step lowered and compiled on simulated devices, and what follows from it for one kind of GPU."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.config import RunConfig
from dsv3_jax.model.counts import flops_per_token, leaves, train_flops_per_token
from dsv3_jax.parallel import make_mesh, mesh_shape
from dsv3_jax.planning.collectives import Collective, parse
from dsv3_jax.planning.frozen import LoraPlan, base_of, lora_flops_per_token, plan_lora
from dsv3_jax.planning.hardware import LINK_SHARE, MATMUL_SHARE, USABLE, Hardware
from dsv3_jax.planning.knobs import Knob, knobs
from dsv3_jax.planning.memory import Memory, abstract_mesh, memory
from dsv3_jax.training.step import abstract_state, batch_sharding, make_train_step

BATCH_KEYS = ("tokens_BT", "targets_BT", "segments_BT", "positions_BT")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step.

    Attributes:
      compute: products at MATMUL_SHARE of the stated rate, recomputation included.
      update: reading and writing weights, moments and gradients once at the stated memory rate.
      communication: collectives one after another at LINK_SHARE of the link rates.
      expected: communication hidden behind the products, or the other way round.
      exposed: nothing hidden.
      bound: everything at its stated rate, all hidden.
      mfu, mfu_exposed: model operations (no recomputation) over the stated rate in `expected` and `exposed`.
    """

    compute: float
    update: float
    communication: float
    expected: float
    exposed: float
    bound: float
    mfu: float
    mfu_exposed: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling took and said: seconds, bytes of arguments and temporaries by XLA:CPU, the collectives."""

    lower_s: float
    compile_s: float
    argument_bytes: int
    temporary_bytes: int
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is shown."""

    name: str
    cfg: RunConfig
    mesh: dict[str, int]
    hardware: Hardware
    memory: Memory
    knobs: tuple[Knob, ...]
    model_flops: float
    executed_flops: float
    compiled: Compiled | None
    times: Times | None
    lora: LoraPlan | None = None

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Tokens of a step over all devices."""
        return self.cfg.training.batch_size * self.cfg.training.seq_len

    @property
    def usable(self) -> int:
        """Bytes of a device that a step may fill."""
        return int(self.hardware.memory * USABLE)

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is within `usable`."""
        return self.memory.peak <= self.usable


def make_plan(cfg: RunConfig, devices: int, hardware: Hardware, *, compiles: bool = True) -> Plan:
    """Plan a run on `devices` devices.

    Args:
      compiles: also lower and compile the step; this process must have that many (simulated) devices.
    Raises:
      ConfigError: mesh, devices, batch, model and base do not fit together.
    """
    shape = mesh_shape(cfg.mesh, devices)
    need = memory(cfg, abstract_mesh(shape))
    items = leaves(cfg.model)
    tokens = cfg.training.batch_size * cfg.training.seq_len / devices
    model_flops = train_flops_per_token(cfg.model, cfg.training.seq_len) * tokens
    forward = flops_per_token(cfg.model, items, cfg.training.seq_len)
    base, further = base_of(cfg.lora, cfg.model), 0.0
    if base is not None:
        model, further = lora_flops_per_token(cfg, base, forward["attention_mean"])
        model_flops = model * tokens
    head = 2 * cfg.model.vocab_size * cfg.model.hidden_size
    # Backward of attention makes the scores again; remat makes the layers' products again, "latents" without them.
    again = 0.5 * forward["attention_mean"]
    if cfg.training.remat != "none":
        again += forward["matmul"] - head
    if cfg.training.remat == "full":
        again += forward["attention_mean"]
    executed = model_flops + (further + again) * tokens
    compiled = compile_step(cfg, devices) if compiles else None
    times = None
    if compiled is not None:
        times = times_of_step(need, model_flops, executed, compiled.collectives, hardware, cfg.model.dtype)
    plan = Plan(cfg.run.name, cfg, shape, hardware, need, (), model_flops, executed, compiled, times)
    plan = dataclasses.replace(plan, lora=plan_lora(cfg, abstract_mesh(shape)))
    return plan if plan.fits else dataclasses.replace(plan, knobs=tuple(knobs(cfg, shape, plan.usable)))


def compile_step(cfg: RunConfig, devices: int) -> Compiled:
    """Lower and compile the real step, state donated, on the first `devices` devices of this process.

    The ragged exchange of GPUs is compiled as the padded one, whose bytes are its upper bound: XLA:CPU has no other.
    Kernels are compiled as their XLA references.
    """
    cfg = dataclasses.replace(cfg, kernels="reference")
    if cfg.moe.dispatch == "ragged_all_to_all":
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, dispatch="all_to_all"))
    mesh = make_mesh(cfg.mesh, jax.devices()[:devices])
    sharding, shape = batch_sharding(mesh), (cfg.training.batch_size, cfg.training.seq_len)
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for key in BATCH_KEYS}
    start = time.perf_counter()
    base = base_of(cfg.lora, cfg.model)
    step = jax.jit(make_train_step(cfg, mesh, base), donate_argnums=0)
    lowered = step.lower(abstract_state(cfg, mesh, base), batch)
    middle = time.perf_counter()
    # Only the optimised program is read: machine code of less quality takes half the time.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": "0"})
    end = time.perf_counter()
    analysis: Any = compiled.memory_analysis()
    return Compiled(
        middle - start,
        end - middle,
        analysis.argument_size_in_bytes,
        analysis.temp_size_in_bytes,
        tuple(parse(compiled.as_text() or "", devices, lowered.as_text())),
    )


def times_of_step(
    need: Memory,
    model: float,
    executed: float,
    collectives: Sequence[Collective],
    hardware: Hardware,
    dtype: str,
) -> Times:
    """Times of a step of `model` and `executed` operations a device, computed in `dtype`."""
    rate = hardware.rate(dtype)
    compute = executed / rate
    # Weights and moments are read and written, gradients read.
    update = (2 * (need.parameters + need.optimizer) + need.parameters) / hardware.memory_rate
    communication = sum(
        max(one.moved / hardware.nvlink, one.network / hardware.network) for one in collectives if one.counted
    )
    busy, moving = compute / MATMUL_SHARE, communication / LINK_SHARE
    expected, exposed = max(busy, moving) + update, busy + moving + update
    return Times(
        busy,
        update,
        moving,
        expected,
        exposed,
        max(compute, communication) + update,
        model / rate / expected,
        model / rate / exposed,
    )


# --- as a mapping ---------------------------------------------------------------------------------------------


def to_json(plan: Plan) -> dict[str, Any]:
    """A plain mapping of a plan, without the config."""
    need, compiled = plan.memory, plan.compiled
    training = plan.cfg.training
    result: dict[str, Any] = {
        "name": plan.name,
        "mesh": plan.mesh,
        "devices": plan.devices,
        "hardware": plan.hardware.name,
        "batch_size": training.batch_size,
        "seq_len": training.seq_len,
        "accumulate": training.accumulate,
        "remat": training.remat,
        "dtype": plan.cfg.model.dtype,
        "memory": {**dataclasses.asdict(need), "peak": need.peak, "usable": plan.usable, "fits": plan.fits},
        "knobs": [dataclasses.asdict(knob) for knob in plan.knobs],
        "model_flops_per_device": plan.model_flops,
        "executed_flops_per_device": plan.executed_flops,
    }
    if plan.lora is not None:
        result["trained_parameters"], result["total_parameters"] = plan.lora.counts
        result["leaves"] = [dataclasses.asdict(row) for row in plan.lora.rows]
    if compiled is not None and plan.times is not None:
        result["collectives"] = table_of(compiled.collectives)
        result["times"] = dataclasses.asdict(plan.times)
        result["lower_s"], result["compile_s"] = compiled.lower_s, compiled.compile_s
        result["argument_bytes_compiled"] = compiled.argument_bytes
        if plan.cfg.model.dtype == "float32":
            result["temporary_bytes_compiled"] = compiled.temporary_bytes
    return result


def table_of(collectives: Sequence[Collective]) -> dict[str, dict[str, Any]]:
    """By kind and size of the group: how often a step runs it, bytes a device sends, bytes of these off the node.

    `overflow_bytes`: what one trip more would send of the loops that serve uneven routing.
    """
    rows: dict[str, dict[str, Any]] = {}
    for one in sorted(collectives, key=lambda one: (one.kind, one.group, one.per_node)):
        key = f"{one.kind} over {one.group}"
        empty = {
            "kind": one.kind,
            "group": one.group,
            "runs": 0,
            "bytes": 0,
            "network_bytes": 0,
            "overflow_bytes": 0,
        }
        row = rows.setdefault(key, empty)
        if one.counted:
            row["runs"] += one.times
            row["bytes"] += one.moved
            row["network_bytes"] += one.network
        else:
            row["overflow_bytes"] += one.moved
    return rows
