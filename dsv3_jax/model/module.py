"""The base module: weights declared by dimension letters, and the two functions that consume them.

A weight's name ends in its letters (`q_b_HQA`). The same letters give its shape (through the config), its
sharding axes (`dsv3_jax.parallel.rules`), its einsum subscripts and its place in a Hugging Face checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig, shape_of
from dsv3_jax.kernels.fp8_matmul.linear import grouped_linear, linear
from dsv3_jax.kernels.grouped_matmul import grouped_matmul as _grouped_matmul
from dsv3_jax.kernels.grouped_matmul import grouped_swiglu as _grouped_swiglu
from dsv3_jax.kernels.registry import full_precision
from dsv3_jax.model.adapted import Adapted
from dsv3_jax.model.rounding import Rounding
from dsv3_jax.parallel.leaves import Sharded, enter, leave
from dsv3_jax.quantization.leaf import Multiplying

Array = jax.Array


class Module(nn.Module):
    """A Linen module with the model's config and `weight`."""

    cfg: ModelConfig

    def weight(self, name: str, axes: str, collection: str = "params") -> Any:
        """The leaf `{name}_{axes}` that the caller supplied.

        It is returned as it is, so it may be an array or any leaf type that `einsum` and `grouped_matmul` know.
        Tracing `init` declares it; `dsv3_jax.model.init_variables` gives first values.

        Args:
          axes: dimension letters, e.g. "HQA"; none may repeat.
          collection: "params" or "router".
        Raises:
          KeyError: the leaf is needed in `apply` and absent.
        """
        leaf = f"{name}_{axes}"
        if self.has_variable(collection, leaf):
            return self.get_variable(collection, leaf)
        if not self.is_initializing():
            raise KeyError(f"the weight {collection}/{'/'.join(self.path)}/{leaf} is missing")
        value = jnp.zeros(shape_of(self.cfg, axes), jnp.float32)
        self.put_variable(collection, leaf, value)
        return value


def einsum(equation: str, x: Array, weight: Any, *, dtype: Any = None) -> Array:
    """Contract activations with a weight, e.g. `einsum("BTA,HQA->BTHQ", x, q_b_HQA)`.

    The weight is cast to the compute type (`dtype`, by default that of `x`); the sum is float32 inside. A `Sharded`
    weight is gathered for this product alone, again in backward; one that stays cut over an axis gives that part of
    the outputs, or, where the letter it is cut along is summed over, the whole sum. A quantised weight is
    multiplied as it is stored; a LoRA pair adds two small products; a `Rounding` one is multiplied in FP8.
    """
    dtype = dtype or x.dtype
    x = x.astype(dtype)
    if isinstance(weight, Adapted):
        (first, one), (second, two) = weight.steps(equation)
        y = einsum(equation, x, weight.base)
        return y + einsum(second, einsum(first, x, one) * weight.scale, two)
    if isinstance(weight, Multiplying):
        return _quantized_product(equation, x, weight)
    product = _product
    if isinstance(weight, Rounding):
        product = functools.partial(_fp8_product, implementation=weight.implementation)
        weight = weight.weight
    if not isinstance(weight, Sharded):
        return product(equation, x, weight.astype(dtype))
    letter, axis = weight.cut or ("", "")
    if axis and letter in equation.partition("->")[2]:
        x = enter(x, axis)
    # Without the checkpoint backward would keep the gathered weights of all layers.
    y = jax.checkpoint(lambda x, weight: product(equation, x, weight.astype(dtype)))(x, weight)
    return leave(y, axis) if axis and letter not in equation.partition("->")[2] else y


def _as_matrix(equation: str) -> tuple[str, str, str] | None:
    """(kept, outer, inner) letters of a product of two matrices, [kept, inner] x [outer, inner]; None for others."""
    inputs, out = equation.split("->")
    ours, theirs = inputs.split(",")
    inner = "".join(letter for letter in theirs if letter not in out)
    outer = theirs[: len(theirs) - len(inner)]
    kept = ours[: len(ours) - len(inner)]
    return (
        (kept, outer, inner) if (ours, theirs, out) == (kept + inner, outer + inner, kept + outer) else None
    )


def _quantized_product(equation: str, x: Array, weight: Multiplying) -> Array:
    letters = _as_matrix(equation)
    # The columns of the stored matrix must be what is summed over (not so in the absorbed use of kv_b).
    if letters is None or math.prod(x.shape[len(letters[0]) :]) != weight.columns:
        return _product(equation, x, weight.astype(x.dtype))
    kept, outer, _ = letters
    y = weight.product(x.reshape(-1, weight.columns))
    return y.reshape(*x.shape[: len(kept)], *weight.shape[: len(outer)])


def _product(equation: str, x: Array, weight: Array) -> Array:
    letters = _as_matrix(equation)
    if letters is None:
        return jnp.einsum(equation, x, weight, precision=full_precision(x.dtype))
    kept, outer, _ = letters
    # As one product of two matrices, [.., in] x [out, in]: given more letters, XLA:CPU copies the weight transposed
    # on every call.
    K = math.prod(x.shape[len(kept) :])
    y = jax.lax.dot_general(
        x.reshape(-1, K), weight.reshape(-1, K), (((1,), (1,)), ((), ())), precision=full_precision(x.dtype)
    )
    return y.reshape(*x.shape[: len(kept)], *weight.shape[: len(outer)])


def _fp8_product(equation: str, x: Array, weight: Array, *, implementation: str) -> Array:
    letters = _as_matrix(equation)
    if letters is None:
        raise ValueError(f"{equation} is no product of two matrices, which FP8 products are")
    kept, outer, _ = letters
    K = math.prod(x.shape[len(kept) :])
    y = linear(x.reshape(-1, K), weight.reshape(-1, K), implementation)
    return y.reshape(*x.shape[: len(kept)], *weight.shape[: len(outer)])


def grouped_matmul(x_ND: Array, weight: Any, group_sizes_E: Array, *, implementation: str = "auto") -> Array:
    """Rows sorted by expert times their expert's matrix: [N, in] and [E, ..., in] -> [N, prod(...)].

    A weight that is cut over an axis gives the product with this device's part (`RoutedExperts` adds them up).
    """
    if isinstance(weight, Adapted):
        y_NF = grouped_matmul(x_ND, weight.base, group_sizes_E, implementation=implementation)
        return y_NF + _grouped_pair(x_ND, weight, group_sizes_E)
    if isinstance(weight, Multiplying):
        return weight.grouped(x_ND, group_sizes_E)
    if isinstance(weight, Rounding):
        whole = weight.weight.astype(x_ND.dtype)
        matrices = whole.reshape(whole.shape[0], -1, whole.shape[-1])
        return grouped_linear(x_ND, matrices, group_sizes_E, weight.implementation, implementation)
    weight = weight.astype(x_ND.dtype)
    matrices = weight.reshape(weight.shape[0], -1, weight.shape[-1])
    return _grouped_matmul(x_ND, matrices, group_sizes_E, implementation=implementation)


def _grouped_pair(x_ND: Array, weight: Adapted, group_sizes_E: Array) -> Array:
    """The experts' pairs, in whatever implementation takes matrices as narrow as a rank."""

    def whole(part: Any) -> Array:
        # Beside a weight that is cut, the factor that is not cut has a part of its gradient on every device.
        mine = part.astype(x_ND.dtype)
        cut = weight.cut
        return enter(mine, cut[1]) if cut and getattr(part, "cut", None) is None else mine

    a, b = whole(weight.a), whole(weight.b)
    E, rank = group_sizes_E.shape[0], b.shape[-1]
    middle = _grouped_matmul(x_ND, a.reshape(E, -1, x_ND.shape[-1]), group_sizes_E) * weight.scale
    b = b.reshape(E, middle.shape[-1] // rank, -1, rank)  # gate and up have a pair each
    return jnp.concatenate(
        [
            _grouped_matmul(middle[:, i * rank : (i + 1) * rank], b[:, i], group_sizes_E)
            for i in range(b.shape[1])
        ],
        axis=-1,
    )


def grouped_swiglu(x_ND: Array, weight: Any, group_sizes_E: Array, *, implementation: str = "auto") -> Array:
    """Rows sorted by expert through their expert's gate and up, [E, 2, F, in]: silu(gate) * up, [N, F].

    A weight that is cut over an axis gives this device's part of F.
    """
    if isinstance(weight, (Multiplying, Adapted, Rounding)):
        both_NF = grouped_matmul(x_ND, weight, group_sizes_E, implementation=implementation)
        gate_NF, up_NF = jnp.split(both_NF, 2, axis=-1)
        return jax.nn.silu(gate_NF) * up_NF
    weight = weight.astype(x_ND.dtype)
    return _grouped_swiglu(x_ND, weight, group_sizes_E, implementation=implementation)


def rows(weight: Any, ids: Array, dtype: Any) -> Array:
    """Rows of a table [V, D] for integer ids of any shape, in `dtype`. Ids are range-checked on the host."""
    return weight.rows(ids, dtype) if isinstance(weight, Sharded) else weight[ids].astype(dtype)


def part(weight: Any, axis: int, start: int, stop: int) -> Any:
    """A slice of a weight along one axis, e.g. the key rows of kv_b."""
    if isinstance(weight, Adapted):
        assert weight.lead <= axis < weight.ndim - weight.inputs, (axis, weight.shape)  # rows, which b has
        rows_of = {name: part(getattr(weight, name), axis, start, stop) for name in ("base", "b")}
        return dataclasses.replace(weight, **rows_of)
    if isinstance(weight, Multiplying):  # blocks need not end where the slice does
        weight = weight.astype(jnp.float32)
    return jax.lax.slice_in_dim(weight, start, stop, axis=axis)
