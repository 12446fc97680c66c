"""A weight inside `jax.shard_map`: this device's part, and how the whole is made where a layer uses it.

The parameter tree that enters the step's `shard_map` holds parts as they are stored. `local_leaves` wraps each in a
`Sharded` leaf; the functions that consume weights (`dsv3_jax.model.module`) call its `astype`, which casts to the
compute type and gathers. Gradients go the other way by themselves: the transpose of a gather is a reduce-scatter,
done in float32, so a device never holds a whole gradient of a dense weight for longer than a layer.

Experts' matrices are not gathered inside layers. Their master copy is cut over data x fsdp as well as over the
expert axis; `compute_copies` gathers the former once a step, and `reduce_gradients` scatters once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel.mesh import BATCH_AXES
from dsv3_jax.parallel.rules import QUANTIZED_PARTS, HasShape, axes_of, compute_spec, storage_spec

Array = jax.Array
Axes = tuple[str, ...]
Gathers = tuple[tuple[int, Axes], ...]  # (dimension counted from the end, mesh axes, outermost first)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one leaf lies on the mesh; static.

    Attributes:
      letters: its dimension letters without the leading layer axis.
      gathers: dimensions that are cut in storage and whole in compute.
      cut: (letter, mesh axis) of the dimension that stays cut for a tensor-parallel product, or None.
      once: gathered once a step, outside the layers (experts), instead of where it is used.
      reduce: batch axes over which its gradient is still to be summed after the reduce-scatter of `gathers`.
    """

    letters: str
    gathers: Gathers = ()
    cut: tuple[str, str] | None = None
    once: bool = False
    reduce: Axes = ()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["local"], meta_fields=["gathers", "cut"])
@dataclasses.dataclass(frozen=True)
class Sharded:
    """This device's part of a weight. A scan over layers slices `local`; the rest counts from the end."""

    local: Array
    gathers: Gathers
    cut: tuple[str, str] | None

    def astype(self, dtype: Any) -> Array:
        """The weight as this device computes with it, in `dtype`."""
        return (
            gather(self.local, self.gathers, jnp.dtype(dtype)) if self.gathers else self.local.astype(dtype)
        )

    def rows(self, ids: Array, dtype: Any) -> Array:
        """`weight[ids]` for a table [V, D], in `dtype`; gradients of a row add up in float32."""
        return gather_rows(self.local, ids, self.gathers, jnp.dtype(dtype))


def _gather(x: Array, gathers: Gathers) -> Array:
    for dim, axes in gathers:
        x = lax.all_gather(x, axes, axis=x.ndim + dim, tiled=True)
    return x


def _scatter(g: Array, gathers: Gathers) -> Array:
    for dim, axes in reversed(gathers):
        g = lax.psum_scatter(g, axes, scatter_dimension=g.ndim + dim, tiled=True)
    return g


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(local: Array, gathers: Gathers, dtype: Any) -> Array:
    """Cast, then all-gather; backward is a float32 reduce-scatter, whatever the compute type."""
    return _gather(local.astype(dtype), gathers)


def _gather_forward(local: Array, gathers: Gathers, dtype: Any) -> tuple[Array, Array]:
    return gather(local, gathers, dtype), jnp.zeros((0,), local.dtype)  # only the type is kept


def _gather_backward(gathers: Gathers, dtype: Any, like: Array, g: Array) -> tuple[Array]:
    return (_scatter(g.astype(jnp.float32), gathers).astype(like.dtype),)


gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gather_rows(local: Array, ids: Array, gathers: Gathers, dtype: Any) -> Array:
    """Rows `ids` of a table whose columns are cut."""
    return _gather(local.astype(dtype), gathers)[ids]


def _rows_forward(local: Array, ids: Array, gathers: Gathers, dtype: Any) -> Any:
    return gather_rows(local, ids, gathers, dtype), (ids, jnp.zeros((local.shape[0], 0), local.dtype))


def _rows_backward(gathers: Gathers, dtype: Any, saved: Any, g: Array) -> tuple[Array, None]:
    ids, like = saved
    table = jnp.zeros((like.shape[0], g.shape[-1]), jnp.float32).at[ids].add(g.astype(jnp.float32))
    return _scatter(table, gathers).astype(like.dtype), None


gather_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def enter(x: Array, axis: str) -> Array:
    """x on its way into products that are cut over `axis`: the same values; gradients of the parts are summed."""
    return x


enter.defvjp(lambda x, axis: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def leave(x: Array, axis: str) -> Array:
    """The sum over `axis` of partial products; every device gets it, and its gradient is everyone's."""
    return lax.psum(x, axis)


leave.defvjp(lambda x, axis: (lax.psum(x, axis), None), lambda axis, _, g: (g,))


def entering(x: Array, weight: Any) -> Array:
    """x as used beside `weight` by each of the devices that the weight is cut over; x itself if it is not cut."""
    cut = getattr(weight, "cut", None)
    return enter(x, cut[1]) if cut else x


def leaving(x: Array, weight: Any) -> Array:
    """The sum of what the devices that `weight` is cut over computed; x itself if it is not cut."""
    cut = getattr(weight, "cut", None)
    return leave(x, cut[1]) if cut else x


# --- trees ----------------------------------------------------------------------------------------------------


def placement_of(path: str, leaf: Any, mesh: HasShape) -> Placement:
    """The placement of a leaf by the two tables. Raises ConfigError as `storage_spec` does."""
    if path.rpartition("/")[2] in QUANTIZED_PARTS:
        return Placement("")  # frozen, and used as it is stored
    letters = "".join(axes_of(path, leaf)).removeprefix("L")
    stored, used = (_axes_by_dim(rule(path, leaf, mesh), leaf) for rule in (storage_spec, compute_spec))
    gathers = []
    cut: tuple[str, str] | None = None
    for dim, (have, keep) in enumerate(zip(stored, used, strict=True)):
        assert have[: len(keep)] == keep, f"{path}: stored over {have}, used over {keep}"
        if have[len(keep) :]:
            gathers.append((dim - len(stored), have[len(keep) :]))
        if "tensor" in keep:
            cut = (letters[dim - len(stored)], "tensor")
    taken = {axis for axes in stored for axis in axes}
    reduce = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1 and axis not in taken)
    return Placement(letters, tuple(gathers), cut, "/experts/" in path, reduce)


def _axes_by_dim(spec: Any, leaf: Any) -> list[Axes]:
    entries = [
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec
    ]
    return [*entries, *[()] * (len(leaf.shape) - len(entries))]


def placements(abstract: Any, mesh: HasShape) -> Any:
    """The tree of placements of {"params": ...} or any tree whose paths begin there."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: placement_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh),
        abstract,
    )


def compute_copies(params: Any, where: Any, dtype: Any) -> Any:
    """The tree that the layers use: experts gathered over data x fsdp in `dtype`, everything else as stored.

    To be called inside `shard_map`, outside of what is differentiated: the gradients of the result are then those
    of the copies, which `reduce_gradients` brings back to the stored parts.
    """

    def one(leaf: Array, p: Placement) -> Any:
        if p.once and p.gathers:
            leaf = _gather(leaf.astype(dtype), p.gathers)
        gathers = () if p.once else p.gathers
        return Sharded(leaf, gathers, p.cut) if gathers or p.cut else leaf

    return jax.tree.map(one, params, where)


def reduce_gradients(grads: Any, where: Any) -> Any:
    """Gradients of this device's tokens -> this device's part of the gradients of the global batch, float32."""

    def one(grad: Any, p: Placement) -> Array:
        if isinstance(grad, Sharded):
            grad = grad.local
        grad = grad.astype(jnp.float32)
        if p.once:
            grad = _scatter(grad, p.gathers)
        return lax.psum(grad, p.reduce) if p.reduce else grad

    return jax.tree.map(one, grads, where, is_leaf=lambda leaf: isinstance(leaf, Sharded))


def storage_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings of a tree whose paths begin with "params" or "router"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.sharding.NamedSharding(
            mesh, storage_spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf, mesh)
        ),
        abstract,
    )


def sharded_like(tree: Any, params: Any, shardings: Any, default: Any) -> Any:
    """Shardings of an optimiser state: a leaf whose path ends with a parameter's, in its shape, lies as that does.

    Args:
      tree: abstract optimiser state.
      params, shardings: abstract parameters and where they lie.
      default: the sharding of everything else (counts).
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    known: Mapping[str, tuple[Any, Any]] = {
        jax.tree_util.keystr(path): (leaf.shape, where)
        for (path, leaf), where in zip(flat, jax.tree.leaves(shardings), strict=True)
    }

    def one(path: Any, leaf: Any) -> Any:
        for start in range(len(path)):
            shape, where = known.get(jax.tree_util.keystr(path[start:]), (None, None))
            if shape == leaf.shape:
                return where
        return default

    return jax.tree_util.tree_map_with_path(one, tree)
