"""Mosaic kernels lower for a GPU at any number of rows: TMA wants whole tiles, the interpreter does not mind."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.attention import attention
from dsv3_jax.kernels.fp8_matmul import shapes as fp8
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from dsv3_jax.kernels.mla_decode import paged_latent_attention
from dsv3_jax.kernels.quantized_matmul import shapes as quantized

pytestmark = pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))


def kernels_of(function, *arguments) -> int:
    """Mosaic kernels of a program lowered for an H200."""
    with shim.compiling_for():
        unchecked = [export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{v}") for v in ("", "_v2")]
        call = jax.jit(functools.partial(function, implementation="mosaic"))
        module = export.export(call, platforms=["cuda"], disabled_checks=unchecked)(*arguments)
    return module.mlir_module().count("custom_call @mosaic_gpu")


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@pytest.mark.parametrize("rows", [18, 77, 300])
@pytest.mark.parametrize("text", ["int4", "int8", "fp8"])
def test_products_with_quantised_weights(text, rows):
    for experts in (0, 5):
        shape = quantized.Shape(rows, 64, 256, experts)
        run = functools.partial(quantized.run, shape=shape, text=text)
        assert kernels_of(run, *quantized.arguments(shape, text)) == 1


@pytest.mark.parametrize(("rows", "inputs"), [(9, 144), (77, 64), (300, 256), (300, 576)])
def test_products_in_fp8(rows, inputs):
    for experts in (0, 5):
        shape = fp8.Shape(rows, 192, inputs, experts)
        assert kernels_of(fp8._forward, *shape.arrays()) == 2


@pytest.mark.parametrize("rows", [18, 77, 300])
def test_products_of_experts_and_their_gradients(rows):
    x, sizes = half(rows, 256), jax.ShapeDtypeStruct((5,), jnp.int32)

    def gradients(x, w, sizes, *, implementation):
        run = functools.partial(grouped_matmul, implementation=implementation)
        return jax.grad(lambda *a: run(*a, sizes).astype(jnp.float32).sum(), argnums=(0, 1))(x, w)

    assert kernels_of(gradients, x, half(5, 256, 256), sizes) == 2
    assert kernels_of(grouped_swiglu, x, half(5, 2, 256, 256), sizes) == 1


@pytest.mark.parametrize("length", [1, 77, 300])
def test_attention_and_its_gradients(length):
    q, k = half(3, length, 2, 192), half(3, length, 2, 192)

    def gradients(q, k, v, *, implementation):
        run = functools.partial(attention, scale=0.1, implementation=implementation)
        return jax.grad(lambda *a: run(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    assert kernels_of(gradients, q, k, half(3, length, 2, 128)) == 3


@pytest.mark.parametrize(("rows", "tokens"), [(3, 1), (5, 3), (1, 77)])
def test_attention_over_pages(rows, tokens):
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def run(q, pages, tables, positions, *, implementation):
        return paged_latent_attention(
            q, pages, tables, positions, value_dim=512, scale=0.1, implementation=implementation
        )

    arrays = half(rows, tokens, 16, 576), half(7, 64, 576), ints((rows, 3)), ints((rows, tokens))
    assert kernels_of(run, *arrays) >= 1
