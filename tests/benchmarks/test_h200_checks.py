"""The rules for programs compiled for H200s see what they are meant to see; real compilation where the plugin is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.h200 import checks, compiler
from benchmarks.h200.compiler import Report
from benchmarks.h200.programs import Program, all_programs, inference_weights
from benchmarks.shapes import MODEL_2B, MODEL_TINY
from dsv3_jax.inference.weights import unstack_layers
from dsv3_jax.model import abstract_variables
from dsv3_jax.quantization.leaf import implemented
from tests.quantization.coded import quantized_variables

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in 'body'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 132 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'other_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for other_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 2 barriers, 1 bytes smem
"""

# 32 tokens, 8 experts of 16 on width 64; a dense product is 2 x 32 x 8 x 16 x 64 operations.
SMALL = dataclasses.replace(
    MODEL_2B, hidden_size=64, moe_intermediate_size=16, n_routed_experts=8, num_hidden_layers=2
)
PROGRAM = Program("p", lambda: report(), SMALL, tokens=32, expert=1, cache_elements=2 * 576)


def report(**changes) -> Report:
    whole = Report(1.0, 100 << 20, 0, [], None, [], "")
    return dataclasses.replace(whole, **changes)


def hlo(*lines: str) -> str:
    return "HloModule m\n\nENTRY %main (x: f32[1]) -> f32[1] {\n" + "".join(f"  {x}\n" for x in lines) + "}\n"


def product(rows: int, where: str) -> str:
    return hlo(
        f"%x = bf16[{rows},64]{{1,0}} parameter(0)",
        "%w = bf16[128,64]{1,0} parameter(1)",
        f"ROOT %d = bf16[{rows},128]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}, "
        f'metadata={{op_name="jit(step)/{where}/dot_general"}}',
    )


def test_registers_and_spills_are_read_from_ptxas():
    kernels = compiler._kernels(PTXAS)
    assert kernels == [
        {"name": "body", "registers": 132, "spilled": 20},
        {"name": "other", "registers": 96, "spilled": 0},
    ]
    assert checks.of_kernels(report(kernels=kernels)) == ["body: 20 bytes spilled with 132 registers"]


def test_shared_memory_beyond_the_device_and_ptxas_warnings_are_breaches():
    assert checks.of_kernels(report(shared_bytes=232_448)) == []
    assert "above 232448" in checks.of_kernels(report(shared_bytes=232_449))[0]
    assert checks.of_kernels(report(warnings=["wgmma serialized"])) == ["wgmma serialized"]


def test_temporary_bytes_may_differ_by_a_twentieth():
    assert checks.against_record(report(), {"temporary_bytes": 105 << 20}) == []
    assert "recorded" in checks.against_record(report(), {"temporary_bytes": 110 << 20})[0]
    assert checks.against_record(report(temporary_bytes=0), {"temporary_bytes": 1 << 20}) == []
    assert "--record" in checks.against_record(report(), None)[0]


def test_a_product_of_all_tokens_with_all_experts_is_seen():
    assert len(checks.dense_products(product(32, "mlp/experts"), PROGRAM)) == 1
    assert checks.dense_products(product(31, "mlp/experts"), PROGRAM) == []
    assert checks.dense_products(product(32, "logits"), PROGRAM) == []
    unnamed = product(32, "x").replace('metadata={op_name="jit(step)/x/dot_general"}', "")
    assert len(checks.dense_products(unnamed, PROGRAM)) == 1
    assert (
        checks.dense_products(
            unnamed, dataclasses.replace(PROGRAM, model=dataclasses.replace(SMALL, vocab_size=128))
        )
        == []
    )


def test_a_cublas_call_is_a_product_too():
    text = hlo(
        "%x = bf16[32,64]{1,0} parameter(0)",
        "%w = bf16[128,64]{1,0} parameter(1)",
        '%d = (bf16[32,128]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
        'metadata={op_name="mlp/experts/dot_general"}, '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
        "ROOT %r = bf16[32,128]{1,0} get-tuple-element(%d), index=0",
    )
    assert [one.flops for one in checks.products(text)] == [2 * 32 * 128 * 64]
    assert len(checks.dense_products(text, PROGRAM)) == 1


def test_an_expert_weight_that_travels_is_seen_and_tokens_are_not():
    sharded = dataclasses.replace(PROGRAM, expert=8)

    def gather(shape: str) -> str:
        return hlo(
            f"%x = bf16[{shape}] parameter(0)", f"ROOT %g = bf16[8,{shape}] all-gather(%x), dimensions={{0}}"
        )

    assert len(checks.gathered_experts(gather("1,2,16,64"), sharded)) == 1
    assert len(checks.gathered_experts(gather("1,64,32"), sharded)) == 1
    assert checks.gathered_experts(gather("128,64"), sharded) == []
    # Both widths of an expert in one size of the tokens: still tokens.
    wide = dataclasses.replace(sharded, model=dataclasses.replace(SMALL, moe_intermediate_size=32))
    assert checks.gathered_experts(gather("128,64"), wide) == []
    assert len(checks.gathered_experts(gather("64,64"), wide)) == 1
    # As many tokens as gate and up have rows: fewer elements than the weights of this device's experts.
    many = dataclasses.replace(sharded, model=dataclasses.replace(SMALL, n_routed_experts=64))
    assert checks.gathered_experts(gather("32,64"), many) == []
    assert len(checks.gathered_experts(gather("8,32,64"), many)) == 1


def test_a_copy_of_the_cache_is_seen():
    copy = "ROOT %c = bf16[2,576]{{1,0}} {}(%p)"
    parameter = "%p = bf16[2,576]{1,0} parameter(0)"
    assert len(checks.cache_copies(hlo(parameter, copy.format("copy")), PROGRAM)) == 1
    assert checks.cache_copies(hlo(parameter, copy.format("negate")), PROGRAM) == []


def test_programs_have_names_of_their_own():
    names = [program.name for program in all_programs()]
    assert len(set(names)) == len(names) > 8


@pytest.mark.parametrize("fmt", ["int4:16", "fp8+act8"])
def test_programs_with_quantised_weights_have_the_leaves_that_loading_makes(fmt):
    """The same shapes, types and static parts as those of matrices that were rounded."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(MODEL_TINY))
    real = unstack_layers(MODEL_TINY, quantized_variables(MODEL_TINY, zeros, fmt)[0])
    abstract = jax.eval_shape(lambda: implemented(real, "mosaic"))
    assert inference_weights(MODEL_TINY, fmt, "mosaic") == abstract


@pytest.mark.skipif(compiler.why_not() is not None, reason=f"NOT RUN: {compiler.why_not()}")
def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there():
    from tests.kernels.test_shim import doubled

    x = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    found = compiler.compile_for_h200(doubled, compiler.on_one_device(x))
    assert [(k["name"], k["spilled"]) for k in found.kernels] == [("body", 0)]
    assert 128 * 128 * 4 <= found.shared_bytes <= 128 * 128 * 4 + 1024
    assert found.argument_bytes == 128 * 128 * 4
