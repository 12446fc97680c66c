"""Muon for stacks of matrices: momentum, orthogonalised matrix by matrix (arXiv 2502.16982).

Which axes of a leaf are one matrix follows from its Hugging Face tensor: `q_b_HQA` is stored there as
"(h q) a -> h q a", so a leaf [L, H, Q, A] is L matrices of H*Q by A; `gate_up_EPFD` is L*E*P matrices of F by D.
Embedding, head, router, norms and biases are updated by AdamW.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.hf.rules import flatten_paths, rule_for, unflatten_paths
from dsv3_jax.kernels.registry import full_precision
from dsv3_jax.parallel import axes_of

Array = jax.Array

# Coefficients of Newton-Schulz as published with Muon: singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2  # AdamW's typical update (arXiv 2502.16982, section 2.2), so that both use one learning rate
_NOT_MUON = re.compile(r"/(embed|head|router)_[A-Z]+$")


class MuonState(NamedTuple):
    """count: int32 updates done; mu: momentum of every leaf; nu: second moment of the leaves that AdamW updates."""

    count: Array  # type: ignore[assignment]  # tuple.count
    mu: Any
    nu: Any


def matrix_axes(path: str) -> tuple[int, int] | None:
    """How many axes at the end of a leaf are a matrix's rows and columns; None for a leaf that AdamW updates.

    >>> matrix_axes("params/moe/attention/q_b_HQA"), matrix_axes("params/moe/attention/o_DHU")
    ((2, 1), (1, 2))
    >>> matrix_axes("params/moe/mlp/router/router_ED") is None
    True
    """
    groups = re.findall(r"\([^)]*\)|\w", rule_for(path).pattern.partition("->")[0])
    if len(groups) != 2 or _NOT_MUON.search(path):
        return None
    rows, columns = (len(group.strip("()").split()) for group in groups)
    return rows, columns


def newton_schulz(x: Array, steps: int, dtype: jax.typing.DTypeLike, eps: float = 1e-7) -> Array:
    """[..., m, n] -> about U V^T of each matrix U S V^T, in `dtype`; a matrix of zeros stays zero.

    The leading axes are kept apart, never merged: a cut along one of them stays a cut.
    """
    x = x.astype(jnp.float32)
    x = (x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + eps)).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    a, b, c = NEWTON_SCHULZ
    precision = full_precision(dtype)

    def one(_: Array, x: Array) -> Array:
        if tall:  # the smaller Gram matrix, x^T x, acts from the right
            gram = jnp.einsum("...mi,...mj->...ij", x, x, precision=precision)
        else:
            gram = jnp.einsum("...im,...jm->...ij", x, x, precision=precision)
        poly = b * gram + c * jnp.matmul(gram, gram, precision=precision)
        if tall:
            return a * x + jnp.matmul(x, poly, precision=precision)
        return a * x + jnp.matmul(poly, x, precision=precision)

    return jax.lax.fori_loop(0, steps, one, x)


def scale_by_muon(optimizer: OptimizerConfig, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """Updates without learning rate or decay: U V^T of the Nesterov momentum times 0.2 sqrt(max(m, n)), or Adam's.

    Args:
      mesh: where the state is cut over devices, the matrices are spread whole over it before they are orthogonalised.
    """
    adam = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
    momentum = optimizer.muon_momentum

    def init(params: Any) -> MuonState:
        flat = flatten_paths(params, "params")
        rest = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if matrix_axes(path) is None}
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), _tree(rest))

    def update(grads: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        gradient, mu = flatten_paths(grads, "params"), flatten_paths(state.mu, "params")
        rest = [path for path in gradient if matrix_axes(path) is None]
        updates, moments = adam.update(
            {path: gradient[path] for path in rest},
            optax.ScaleByAdamState(
                count=state.count,
                mu={path: mu[path] for path in rest},
                nu=flatten_paths(state.nu, "params"),
            ),
        )
        new_mu = dict(moments.mu)
        for path, grad in gradient.items():
            axes = matrix_axes(path)
            if axes is None:
                continue
            new_mu[path] = momentum * mu[path] + (1.0 - momentum) * grad
            ahead = momentum * new_mu[path] + (1.0 - momentum) * grad  # Nesterov
            updates[path] = _orthogonal(path, ahead, axes, optimizer, mesh)
        return _tree(updates), MuonState(moments.count, _tree(new_mu), _tree(moments.nu))

    return optax.GradientTransformation(init, update)


def _tree(flat: dict[str, Any]) -> Any:
    return unflatten_paths(dict(sorted(flat.items()))).get("params", {})


def _orthogonal(
    path: str, x: Array, axes: tuple[int, int], optimizer: OptimizerConfig, mesh: Mesh | None
) -> Array:
    batch = x.ndim - sum(axes)
    matrices = x.reshape(*x.shape[:batch], math.prod(x.shape[batch : batch + axes[0]]), -1)
    whole: Callable[[Array], Array] = _same
    if mesh is not None and mesh.size > 1:
        spec = spread(axes_of(path, x)[:batch], x.shape[:batch], mesh)
        whole = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec))
    # Before and after: the partitioner would else give the iteration the layout of what it is added to.
    result = whole(newton_schulz(whole(matrices), optimizer.muon_steps, jnp.dtype(optimizer.muon_dtype)))
    scale = UPDATE_RMS * math.sqrt(max(matrices.shape[-2:]))
    return (result.astype(jnp.float32) * scale).reshape(x.shape)


def _same(x: Array) -> Array:
    return x


def spread(letters: tuple[str, ...], sizes: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How stacked matrices are cut so that each is whole on one device and no two devices do the same one.

    Every mesh axis cuts a leading axis that it divides: `expert` the experts, as they are stored, the others the
    largest. A mesh axis that divides none is left to the partitioner, which may then cut the matrices themselves.

    Args:
      letters, sizes: of the leading axes, e.g. ("L", "E", "P").
    """
    cut: list[list[str]] = [[] for _ in sizes]
    left, whole = list(sizes), True
    for axis in sorted(mesh.axis_names, key=lambda axis: axis != "expert"):
        parts = mesh.shape[axis]
        fits = [at for at, size in enumerate(left) if size % parts == 0]
        if axis == "expert" and "E" in letters:
            fits = [at for at in fits if letters[at] == "E"]
        if parts > 1 and fits:
            at = max(fits, key=lambda at: left[at])
            cut[at].append(axis)
            left[at] //= parts
        whole = whole and (parts == 1 or bool(fits))
    rest = None if whole else PartitionSpec.UNCONSTRAINED
    return PartitionSpec(*(tuple(axes) or None for axes in cut), rest, rest)
