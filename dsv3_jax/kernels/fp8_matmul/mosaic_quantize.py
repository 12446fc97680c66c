"""Pallas Mosaic GPU kernel that rounds activations to e4m3 by line: one pass over x, as `quantize.quantize_lines` says.

XLA makes three kernels of it, two of which read x. Here a block of 128 threads takes 64 rows x 128 columns, one scale a
row, and the scales leave as [column blocks, rows], the way the product reads them. Blocks are independent and small:
eight share a multiprocessor, which is what hides the latency of memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.fp8_matmul.quantize import BLOCK, Coded, quotients, scales_of
from dsv3_jax.kernels.grouped_matmul.pipeline import LINE, whole_lines
from dsv3_jax.kernels.shim import pl, plgpu

# A copy's lines begin at multiples of 16 bytes.
SCALES_ALIGNED = 4


def quantize_lines(x_NK: jax.Array) -> Coded:
    """Codes [N, K] and scales [ceil(K / 128), N'], N' the next multiple of 4; a 16-bit type, K a multiple of 16."""
    N, K = x_NK.shape
    pads = whole_lines(N, LINE) - N, -K % BLOCK
    if any(pads):
        x_NK = jnp.pad(x_NK, ((0, pads[0]), (0, pads[1])))
    rows, columns = x_NK.shape
    down, across = -(-rows // LINE), -(-columns // BLOCK)

    def body(x, codes, scales, x_smem, codes_smem, scales_smem, loaded):
        row, block = lax.axis_index("row") * LINE, lax.axis_index("block")
        where = pl.ds(row, LINE), pl.ds(block * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(x.at[where], x_smem, loaded)
        plgpu.barrier_wait(loaded)
        values = shim.load(x_smem, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        scale_R = scales_of(jnp.max(jnp.abs(values), axis=1))
        scale = lax.broadcast_in_dim(scale_R, (LINE, BLOCK), (0,))
        codes_smem[...] = quotients(values, scale).astype(jnp.float8_e4m3fn)
        scales_smem[...] = scale_R
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_smem, codes.at[where])
        plgpu.copy_smem_to_gmem(scales_smem, scales.at[block, pl.ds(row, LINE)])
        plgpu.wait_smem_to_gmem(0)

    padded = -(-rows // SCALES_ALIGNED) * SCALES_ALIGNED
    run = shim.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((across, padded), jnp.float32),
        ),
        grid=(down, across),
        grid_names=("row", "block"),
        compiler_params=shim.compiler_params(),
        scratch_types=(
            plgpu.SMEM(
                (LINE, BLOCK),
                x_NK.dtype,
                transforms=(plgpu.TilingTransform((8, LINE)), plgpu.SwizzleTransform(BLOCK)),
            ),
            plgpu.SMEM(
                (LINE, BLOCK),
                jnp.float8_e4m3fn,
                transforms=(plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK)),
            ),
            plgpu.SMEM((LINE,), jnp.float32),
            plgpu.Barrier(),
        ),
    )
    codes_NK, scales_GN = run(x_NK)
    return Coded(codes_NK[:N, :K], scales_GN[: -(-K // BLOCK), : -(-N // SCALES_ALIGNED) * SCALES_ALIGNED])
