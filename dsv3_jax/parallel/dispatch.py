"""Expert parallelism: one interface from routed tokens to their experts' weighted sum, with exchangeable backends.

It runs inside a `shard_map` whose mesh axes are manual (check_vma=False). Tokens are cut over `Dispatch.axis` and
experts too, contiguous ones on a device, so that expert groups of node-limited routing align with devices.

- `gather`: every device sees every token and computes its own experts; results are reduce-scattered in float32.
- `all_to_all`: a token goes once to each device that holds any of its experts, in padded blocks.
- `ragged_all_to_all`: the same without the padding; GPUs only.

All of them drop nothing unless a capacity is fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.parallel.exchange import Compute, exchanged, gathered
from dsv3_jax.parallel.swap import swap_padded, swap_ragged

Array = jax.Array
Backend = Literal["auto", "gather", "all_to_all", "ragged_all_to_all"]
BACKENDS: tuple[str, ...] = ("auto", "gather", "all_to_all", "ragged_all_to_all")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How a layer's experts are spread over devices; static."""

    axis: str = "expert"
    """Mesh axis the experts are cut over."""
    size: int = 1
    """Devices along it."""
    backend: Backend = "auto"
    chunk: int = 4096
    """Tokens of a device that are exchanged at a time, which bounds the buffers; 0: all."""
    capacity_factor: float = 0.0
    """0: dropless. Above 0: rows of the blocks of all_to_all in multiples of what even routing fills; pairs beyond
    are dropped and counted."""
    fan_out: int = 0
    """The most devices that a token's experts can lie on (node-limited routing); 0: as many as experts per token."""
    platform: str = ""
    """What the program is compiled for; "": this process's default backend."""

    def __post_init__(self) -> None:
        for ok, name, value, expected in (
            (self.size >= 1, "size", self.size, "1 or more"),
            (self.backend in BACKENDS, "backend", self.backend, f"one of {', '.join(BACKENDS)}"),
            (self.chunk >= 0, "chunk", self.chunk, "0 (all) or more"),
            (self.capacity_factor >= 0, "capacity_factor", self.capacity_factor, "0 (dropless) or more"),
            (self.fan_out >= 0, "fan_out", self.fan_out, "0 or more"),
        ):
            if not ok:
                raise ConfigError(f"dispatch {name} is {value!r}; expected {expected}")
        if self.capacity_factor and self.backend == "gather":
            raise ConfigError(
                f"dispatch capacity_factor is {self.capacity_factor} with backend 'gather', which drops nothing; "
                "expected 0, or backend all_to_all"
            )


def most_peers(cfg: ModelConfig, size: int) -> int:
    """The most devices that one token's experts lie on, when `size` devices hold contiguous experts each."""
    each, most = cfg.n_routed_experts // size, min(cfg.num_experts_per_tok, size)
    if cfg.topk_method not in ("noaux_tc", "group_limited_greedy"):
        return most
    group = cfg.n_routed_experts // cfg.n_group
    touched = sorted(((g + 1) * group - 1) // each - g * group // each + 1 for g in range(cfg.n_group))
    return min(most, sum(touched[-cfg.topk_group :]))


def make_dispatch(
    cfg: ModelConfig,
    size: int,
    *,
    axis: str = "expert",
    backend: Backend = "auto",
    chunk: int = Dispatch.chunk,
    capacity_factor: float = 0.0,
    platform: str = "",
) -> Dispatch | None:
    """The dispatch of a model over `size` devices, its backend chosen; None where all experts are local.

    Raises:
      ConfigError: experts do not divide, or the backend cannot run on the platform.
    """
    if size == 1 or not cfg.n_routed_experts:
        return None
    if cfg.n_routed_experts % size:
        raise ConfigError(
            f"mesh.{axis} is {size}; expected a divisor of model.n_routed_experts = {cfg.n_routed_experts}"
        )
    wanted = Dispatch(axis, size, backend, chunk, capacity_factor, most_peers(cfg, size), platform)
    return dataclasses.replace(wanted, backend=choose_backend(wanted, cfg.num_experts_per_tok))


def choose_backend(dispatch: Dispatch, experts_per_token: int) -> Backend:
    """The backend that runs: the one named, or for "auto" one by shape; the choice is logged once with its reason.

    gather sends a token to all other devices and sums in float32; all_to_all sends it to its experts' devices only,
    in blocks with headroom and more, smaller exchanges. In bfloat16 that is less than half of gather's bytes when the
    axis is more than twice as long as a token's fan-out: from there on it is chosen (by bytes, not measured on GPUs).

    Raises:
      ConfigError: the named backend cannot run on this platform.
    """
    platform = dispatch.platform or jax.default_backend()
    if dispatch.backend == "ragged_all_to_all" and platform not in ("gpu", "cuda", "rocm"):
        raise ConfigError(
            f"dispatch backend 'ragged_all_to_all' cannot run on {platform}: XLA implements it for GPUs only; "
            "expected gather, all_to_all or auto"
        )
    if dispatch.backend != "auto":
        return dispatch.backend
    peers = min(dispatch.fan_out or experts_per_token, experts_per_token, dispatch.size)
    if dispatch.capacity_factor:
        name, reason = "all_to_all", f"capacity_factor is {dispatch.capacity_factor}"
    elif dispatch.size <= 2 * peers:
        name, reason = "gather", f"a token's experts lie on up to {peers} of {dispatch.size} devices"
    else:
        name, reason = "all_to_all", f"a token's experts lie on only {peers} of {dispatch.size} devices"
    _log_choice(name, reason)
    return name  # type: ignore[return-value]


@functools.cache
def _log_choice(name: str, reason: str) -> None:
    # Cached so that a choice made in every layer of every trace is announced once.
    logger.info("expert dispatch: backend %r, as %s", name, reason)


def dispatch_experts(
    x_ND: Array,
    experts_NK: Array,
    weights_NK: Array,
    compute: Compute,
    *,
    dispatch: Dispatch | None,
    num_experts: int,
) -> tuple[Array, Array]:
    """Each token's weighted sum over its experts, wherever they are.

    Differentiable in x, the weights and whatever `compute` closes over. Cotangents are per device: the loss is the
    sum of the devices' own losses, and the gradient of a device's expert weights is complete over the axis.

    Args:
      x_ND: this device's tokens.
      experts_NK: int32, distinct in a token; -1 with weight 0 is none (padding is not sent).
      weights_NK: float32.
      compute: (rows [R, D] sorted by this device's experts, int32 group sizes [experts / size]) -> [R, D]: the
        expert layer on one device, closing over this device's weights.
      dispatch: None or of size 1: all experts are here.
      num_experts: over all devices.

    Returns:
      [N, D] in x's type, and this device's number of dropped pairs (float32).
    """
    if dispatch is None or dispatch.size == 1:
        return _one_device(x_ND, experts_NK, weights_NK, compute, num_experts), jnp.zeros((), jnp.float32)
    if num_experts % dispatch.size:
        raise ConfigError(f"{num_experts} experts over {dispatch.size} devices; expected a divisor")
    N, K = experts_NK.shape
    visit = functools.partial(
        _visit,
        compute=compute,
        dispatch=dispatch,
        backend=choose_backend(dispatch, K),
        num_experts=num_experts,
    )
    visits = math.ceil(N / (dispatch.chunk or N))
    if visits == 1:
        return visit(x_ND, experts_NK, weights_NK)
    chunk = math.ceil(N / visits)
    short = visits * chunk - N

    def cut(x: Array, fill: int) -> Array:
        return jnp.pad(x, ((0, short), (0, 0)), constant_values=fill).reshape(visits, chunk, x.shape[1])

    # Recomputed in backward: kept residuals would grow with the number of chunks, which is what chunks are against.
    step = jax.checkpoint(visit, prevent_cse=False)
    _, (y, dropped) = lax.scan(
        lambda _, xs: (None, step(*xs)), None, (cut(x_ND, 0), cut(experts_NK, -1), cut(weights_NK, 0))
    )
    return y.reshape(visits * chunk, -1)[:N], jnp.sum(dropped)


def _visit(
    x_ND: Array,
    experts_NK: Array,
    weights_NK: Array,
    *,
    compute: Compute,
    dispatch: Dispatch,
    backend: str,
    num_experts: int,
) -> tuple[Array, Array]:
    axis, size, experts = dispatch.axis, dispatch.size, num_experts // dispatch.size
    if backend == "gather":
        y_ND = gathered(x_ND, experts_NK, weights_NK, compute, axis=axis, size=size, experts=experts)
        return y_ND, jnp.zeros((), jnp.float32)
    return exchanged(
        x_ND,
        experts_NK,
        weights_NK,
        compute,
        axis=axis,
        size=size,
        experts=experts,
        fan_out=dispatch.fan_out or experts_NK.shape[1],
        capacity_factor=dispatch.capacity_factor,
        swap=swap_ragged if backend == "ragged_all_to_all" else swap_padded,
    )


def _one_device(
    x_ND: Array, experts_NK: Array, weights_NK: Array, compute: Compute, num_experts: int
) -> Array:
    """Sort pairs by expert, compute, gather back."""
    N, K = experts_NK.shape
    expert_of_pair = experts_NK.reshape(-1)
    order = jnp.argsort(expert_of_pair, stable=True)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(N * K, dtype=order.dtype), unique_indices=True)
    group_sizes_E = jnp.bincount(expert_of_pair, length=num_experts).astype(jnp.int32)
    y = compute(x_ND[order // K], group_sizes_E)
    # Gather back and add over K in the order of choice, so that a token's sum does not depend on the others.
    y_NKD = y[place].reshape(N, K, -1).astype(jnp.float32)
    return jnp.sum(y_NKD * weights_NK[:, :, None], axis=1).astype(x_ND.dtype)
