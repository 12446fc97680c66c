"""Pallas Mosaic GPU as one interface for jax 0.10.2 to 0.12: what moved or differs is settled here.

A kernel module takes its names from here and is then the same on every version:

    from dsv3_jax.kernels.shim import pl, plgpu          # None where `why_not_mosaic()` gives a reason
    from dsv3_jax.kernels import shim

    shim.kernel(body, out_type=..., scratch_types=[...], grid=..., ...)(x)

Importing this module touches no device and fails on no version. What differs:

| | 0.10.2 | 0.11 | 0.12 | here |
|---|---|---|---|---|
| `kernel(out_shape=, scratch_shapes=)` | or `out_type=` .. | `out_type=` .. | the same | `kernel` takes the new names |
| `kernel(cost_estimate=)` | no | no | yes | `kernel` passes it on where it is known |
| `load(ref, idx)` | idx needed | idx deprecated | gone | `load(ref)`, of `ref.at[...]` |
| transposed reference | `transpose_ref` | `ref.transpose` | the same | `transpose(ref, permutation)` |
| default lowering semantics | lane | warpgroup | warpgroup | `compiler_params` names them |
| interpret mode | knows no layouts | yes | yes | `interpret()`, `why_not_interpret()`, `interpreting()` |
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

pl: Any = None
plgpu: Any = None
_interpret: Any = None
_missing: str | None = None
try:
    from jax._src.pallas.mosaic_gpu.interpret import params as _interpret
    from jax.experimental import pallas as pl  # noqa: F401 (kernel modules take it from here)
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as error:
    _missing = f"{type(error).__name__}: {error}"

FIRST, BEYOND = (0, 10, 2), (0, 13)


VERSION = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdecimal())


def why_not_mosaic() -> str | None:
    """The reason Mosaic kernels cannot be built with this jax, or None if they can. Touches no device."""
    if _missing is not None:
        return f"jax {jax.__version__} has no usable Pallas Mosaic GPU here ({_missing})"
    if not FIRST <= VERSION < BEYOND:
        return f"the Mosaic kernels are written for jax 0.10.2 to 0.12, this is jax {jax.__version__}"
    return None


@dataclass(frozen=True)
class Target:
    """What a program that is being traced will run on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the family of the device as tables name it: "H200" for "NVIDIA H200", "H100" for "NVIDIA H100 80GB HBM3".
      cores: streaming multiprocessors; None where that is not known.
      interpreted: Mosaic kernels are interpreted (`interpret`), on whatever platform.
    """

    platform: str
    kind: str
    cores: int | None
    interpreted: bool = False


def family(device_kind: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "H100"."""
    words = [word for word in device_kind.split() if word.upper() not in ("NVIDIA", "AMD", "TESLA")]
    return words[0] if words else device_kind


def target() -> Target:
    """The device of the mesh being traced for (inside `shard_map` or `compiling_for`), else the default one."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        platform, cores = device.platform, device.num_cores
    else:
        platform = jax.default_backend()
        device = jax.devices()[0]
        cores = getattr(device, "core_count", None)
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    return Target(platform, family(device.device_kind), cores, interpreting())


@contextlib.contextmanager
def compiling_for(device_kind: str = "NVIDIA H200", cores: int = 132) -> Iterator[None]:
    """Trace and lower for a GPU that is not here: `target()` names it, and Mosaic kernels lower for it."""
    device = AbstractDevice(device_kind=device_kind, num_cores=cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


INTERPRETED_CORES = 4


def sm_count() -> int:
    """Streaming multiprocessors of `target()`, for persistent grids; a few when interpreted or not known."""
    return target().cores or INTERPRETED_CORES


# --- interpret mode ----------------------------------------------------------------------------------------


def why_not_interpret() -> str | None:
    """The reason Mosaic kernels cannot be interpreted with this jax, or None if they can."""
    if VERSION < (0, 11):
        return f"the Mosaic interpreter of jax {jax.__version__} knows no layouts; 0.11 or later does (Python 3.12)"
    return why_not_mosaic()


def interpret(*, detect_races: bool = False, **parameters: Any) -> contextlib.AbstractContextManager[None]:
    """Run Mosaic kernels traced inside this context by JAX's interpreter, on CPU; jit caches are kept apart.

    Unset shared memory is NaN and an access out of bounds raises. A kernel may ask `interpreting()` to
    replace the few operations that the interpreter does not know (`run_state(ACC)`, WGMMA with its left
    side in registers, BlockSpec windows).

    Raises:
      ValueError: this jax cannot interpret them, with the reason.
    """
    reason = why_not_interpret()
    if reason is not None:
        raise ValueError(reason)
    return _interpret.force_gpu_interpret_mode(
        _interpret.InterpretGPUParams(detect_races=detect_races, **parameters)
    )


def interpreting() -> bool:
    """Whether a Mosaic kernel traced now is interpreted."""
    return jax._src.config.pallas_tpu_interpret_mode_context_manager.value is not None


# --- kernels -----------------------------------------------------------------------------------------------


def kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch_types: Any = (),
    cost_estimate: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` under its newest spelling; the options (grid, cluster, num_threads, ...) pass through.

    Raises:
      ValueError: this jax has no Mosaic, with the reason.
    """
    reason = why_not_mosaic()
    if reason is not None:
        raise ValueError(reason)
    if cost_estimate is not None and "cost_estimate" in inspect.signature(plgpu.kernel).parameters:
        options["cost_estimate"] = cost_estimate
    return plgpu.kernel(body, out_type=out_type, scratch_types=scratch_types, **options)


def compiler_params(*, warpgroup: bool = False, **options: Any) -> Any:
    """`plgpu.CompilerParams` with the lowering semantics named, whose default changed in 0.11.

    Args:
      warpgroup: layouts are inferred by the compiler; otherwise ("lane") they are the kernel's, as written.
    """
    semantics = plgpu.LoweringSemantics
    return plgpu.CompilerParams(
        lowering_semantics=semantics.Warpgroup if warpgroup else semantics.Lane, **options
    )


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """The value of a whole reference (`ref.at[...]` for a part of it) in a layout."""
    if VERSION < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def transpose(ref: Any, permutation: tuple[int, ...]) -> Any:
    """A reference with its axes permuted; nothing is copied."""
    return ref.transpose(permutation) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, permutation)
