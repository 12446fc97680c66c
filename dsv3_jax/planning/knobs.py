"""What lowers the peak memory of a run: changes of its config, tried on the memory model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax.config import MeshConfig, RunConfig, from_mapping
from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.memory import abstract_mesh, memory


@dataclasses.dataclass(frozen=True)
class Knob:
    """One change of the config and the peak memory with it."""

    flags: str
    peak: int
    cost: str


def knobs(cfg: RunConfig, shape: Mapping[str, int], usable: int) -> Iterator[Knob]:
    """Changes that lower the peak: each alone, the best first; then the first combination that fits, if one does."""
    single = []
    for flags, cost, changed, mesh in _changes(cfg, shape):
        with contextlib.suppress(ConfigError):  # not a change that this run can make
            single.append((memory(changed, abstract_mesh(mesh)).peak, flags, cost))
    now = memory(cfg, abstract_mesh(shape)).peak
    single = sorted(one for one in single if one[0] < now)
    yield from (Knob(flags, peak, cost) for peak, flags, cost in single)
    if single and single[0][0] > usable:
        yield from _together(cfg, shape, usable)


def _together(cfg: RunConfig, shape: Mapping[str, int], usable: int) -> Iterator[Knob]:
    """Greedy: the best change, then the best one on top of it."""
    flags: list[str] = []
    costs: list[str] = []
    peak = memory(cfg, abstract_mesh(shape)).peak
    for _ in range(8):
        options = []
        for flag, cost, changed, mesh in _changes(cfg, shape):
            with contextlib.suppress(ConfigError):
                options.append((memory(changed, abstract_mesh(mesh)).peak, flag, cost, changed, dict(mesh)))
        if not options:
            return
        best = min(options, key=lambda option: option[0])
        if best[0] >= peak:
            return
        peak, flag, cost, cfg, shape = best
        key = flag.split()[0]
        kept = [i for i, old in enumerate(flags) if old.split()[0] != key]
        flags, costs = [*(flags[i] for i in kept), flag], [*(costs[i] for i in kept), cost]
        if peak <= usable:
            yield Knob(" ".join(flags), peak, "together; " + "; ".join(dict.fromkeys(costs)))
            return


_Change = tuple[str, str, RunConfig, Mapping[str, int]]


def _changes(cfg: RunConfig, shape: Mapping[str, int]) -> Iterator[_Change]:
    training, devices = cfg.training, math.prod(shape.values())

    def changed(section: str, **values: Any) -> RunConfig:
        return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})

    for remat, cost in (
        ("latents", "recomputes up-projections and feed-forward layers"),
        ("full", "recomputes whole layers"),
    ):
        if ("none", "latents", "full").index(training.remat) < ("none", "latents", "full").index(remat):
            yield f"--training.remat {remat}", cost, changed("training", remat=remat), shape
    rows = training.batch_size * shape["tensor"] // (devices * training.accumulate)
    if rows > 1 and rows % 2 == 0:
        twice = 2 * training.accumulate
        yield (
            f"--training.accumulate {twice}",
            "smaller products",
            changed("training", accumulate=twice),
            shape,
        )
    if training.loss_chunk > 256:
        half = training.loss_chunk // 2
        yield f"--training.loss_chunk {half}", "smaller products", changed("training", loss_chunk=half), shape
    if cfg.optimizer.moment_dtype == "float32":
        rounded = changed("optimizer", moment_dtype="bfloat16")
        yield "--optimizer.moment_dtype bfloat16", "moments are rounded", rounded, shape
    if cfg.lora.rank and cfg.lora.base_quantize == "none":
        rounded = changed("lora", base_quantize="int4:64")
        yield "--lora.base_quantize int4:64", "the base is rounded", rounded, shape
    if cfg.model.dtype == "float32":
        yield "--model.dtype bfloat16", "rounding", changed("model", dtype="bfloat16"), shape
    if shape["expert"] * 2 <= cfg.model.n_routed_experts:
        for axis in ("fsdp", "data"):
            if shape[axis] % 2 == 0:
                mesh = {**shape, axis: shape[axis] // 2, "expert": shape["expert"] * 2}
                yield (
                    _mesh_flags(cfg, mesh),
                    "tokens travel further to their experts",
                    _meshed(cfg, mesh),
                    mesh,
                )
    if shape["data"] % 2 == 0:
        mesh = {**shape, "data": shape["data"] // 2, "fsdp": shape["fsdp"] * 2}
        yield _mesh_flags(cfg, mesh), "weights are gathered over more devices", _meshed(cfg, mesh), mesh
    mesh = {**shape, "fsdp": shape["fsdp"] * 2}
    if training.batch_size % (2 * devices // shape["tensor"] * training.accumulate) == 0:
        yield (
            f"--devices {2 * devices} {_mesh_flags(cfg, mesh)}",
            "twice the devices",
            _meshed(cfg, mesh),
            mesh,
        )


def _meshed(cfg: RunConfig, mesh: Mapping[str, int]) -> RunConfig:
    return dataclasses.replace(cfg, mesh=from_mapping(MeshConfig, mesh))


def _mesh_flags(cfg: RunConfig, mesh: Mapping[str, int]) -> str:
    stated = {axis: getattr(cfg.mesh, axis) for axis in mesh}
    preset = ["--mesh.preset none"] if cfg.mesh.preset != "none" else []
    changed = [f"--mesh.{axis} {size}" for axis, size in mesh.items() if size != stated[axis]]
    return " ".join(preset + changed)
