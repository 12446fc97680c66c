"""AdamW and Muon, without their learning rate (`dsv3_jax.training.schedules`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.training.muon import scale_by_muon


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a tree path is a matrix, by the letters of its name: norms and biases have one."""
    return len(str(path[-1].key).rpartition("_")[2]) >= 2


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def make_optimizer(
    optimizer: OptimizerConfig, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformation:
    """AdamW or Muon with clipping by global norm, without the learning rate.

    Its updates are to be multiplied by -learning_rate(step): the rate follows the step of the run, which also
    counts steps that were not applied. Whatever the optimiser, its state holds one `count`, one tree `mu` and one
    tree `nu` (`optax.tree_utils.tree_get`): that is what checkpoints keep.

    Args:
      mesh: the mesh of the state, where Muon's matrices are to be spread over it.
    """
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    if optimizer.name == "muon":
        scale = scale_by_muon(optimizer, mesh)
    else:
        scale = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
    return optax.chain(
        clip,
        with_moment_dtype(scale, jnp.dtype(optimizer.moment_dtype)),
        optax.add_decayed_weights(optimizer.weight_decay, decay_mask),
    )


def with_moment_dtype(
    inner: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
    """`inner` with its moments kept in `dtype` between steps and float32 within one.

    Rounded to the nearest value: a moment follows its gradients as long as 1 - b is above half a step of the type
    (bfloat16: b up to 0.996), which holds for the report's b2 = 0.95; the V3 report, section 3.3, keeps both of
    AdamW's moments in bfloat16.
    """

    def cast(state: Any, to: jax.typing.DTypeLike) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
