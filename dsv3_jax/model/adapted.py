"""A leaf with a LoRA pair (arXiv 2106.09685): W + scale * b a, never added up in a product.

The pair has PEFT's orientation: a [rank, in] and b [out, rank] for each matrix of the leaf. Its letters follow from the
leaf's: with O for the rank, `q_b_HQA` has a_OA and b_HQO, `o_DHU` a_OHU and b_DO, `gate_up_EPFD` a_EPOD and b_EPFO. So
the same letters give shapes, sharding and the two smaller products that stand for one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.registry import full_precision

Array = jax.Array
RANK = "O"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b"],
    meta_fields=["lead", "inputs", "scale"],
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight and its pair. A scan over layers slices all three.

    Attributes:
      base: the weight: an array, a `Quantized` leaf or, inside a `shard_map`, a `Sharded` part.
      a: [(L), .., rank, in letters]; b: [(L), .., out letters, rank]; both may be `Sharded` parts.
      lead: how many of the leaf's letters (E, P) count matrices; L is not among them.
      inputs: how many letters at the end are a matrix's columns.
      scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    base: Any
    a: Any
    b: Any
    lead: int
    inputs: int
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its pair."""
        return int(self.base.nbytes + self.a.nbytes + self.b.nbytes)

    @property
    def cut(self) -> tuple[str, str] | None:
        """As `Sharded.cut`: the letter and mesh axis that the weight stays cut over."""
        return getattr(self.base, "cut", None)

    def delta(self) -> Array:
        """scale * b a as one array like the leaf, float32."""
        front = self.a.shape[: self.a.ndim - 1 - self.inputs]
        a = jnp.asarray(self.a, jnp.float32).reshape(*front, self.a.shape[len(front)], -1)
        b = jnp.asarray(self.b, jnp.float32).reshape(*front, -1, self.b.shape[-1])
        product = jnp.matmul(b, a, precision=full_precision(jnp.float32))
        return (self.scale * product).reshape(self.shape)

    def astype(self, dtype: Any) -> Array:
        """The merged weight, added up in float32."""
        return (jnp.asarray(self.base.astype(jnp.float32)) + self.delta()).astype(dtype)

    def steps(self, equation: str) -> tuple[tuple[str, Any], tuple[str, Any]]:
        """The two products that stand for `equation` with the pair, each with its factor: x first, then the result.

        The factor whose letters are summed over comes first, so the absorbed use of kv_b begins with b.
        """
        inputs, out = equation.split("->")
        ours, theirs = inputs.split(",")
        end = len(theirs) - self.inputs
        a = theirs[: self.lead] + RANK + theirs[end:]
        b = theirs[:end] + RANK
        (first, one), (second, two) = (a, self.a), (b, self.b)
        if set(theirs[end:]) & set(out):
            (first, one), (second, two) = (second, two), (first, one)
        kept = [letter for letter in ours if letter in out or letter in second]
        kept += [letter for letter in first if letter not in ours and letter != RANK]
        middle = "".join(kept) + RANK
        return (f"{ours},{first}->{middle}", one), (f"{middle},{second}->{out}", two)
