"""The Mosaic kernels of the grouped product: the tile schedule, and every program in JAX's GPU interpreter.

The interpreter hands out shared memory and results filled with NaN, so a row that is not written shows.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.kernels import shim
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from dsv3_jax.kernels.grouped_matmul.mosaic import default_gradient_tile, default_tile
from dsv3_jax.kernels.grouped_matmul.mosaic_dw import GradientTile, weight_gradient
from dsv3_jax.kernels.grouped_matmul.mosaic_product import Tile, product
from dsv3_jax.kernels.grouped_matmul.pipeline import CONSUMERS, LINE, SHARED_BYTES
from dsv3_jax.kernels.grouped_matmul.schedule import most_tiles, schedule
from dsv3_jax.kernels.grouped_matmul.shapes import DEVICE_SHAPES, INTERPRETED, SHAPES, Shape, cases
from dsv3_jax.parallel.dispatch import dispatch_experts

FUNCTIONS = {"grouped_matmul": grouped_matmul, "grouped_swiglu": grouped_swiglu}

needs_interpreter = pytest.mark.skipif(
    shim.why_not_interpret() is not None, reason=str(shim.why_not_interpret())
)

# Group sizes as fractions: boundaries inside tiles and at their edges, one row, empty first, middle and last groups.
GROUPINGS = {
    "ragged": [0.3, 0.0, 1e-9, 0.5, 0.1],
    "hot": [0.0, 0.0, 1.0, 0.0, 0.0],
    "edges": [0.2, 0.2, 0.2, 0.2, 0.2],
    "none": [0.0, 0.0, 0.0, 0.0, 0.0],
}


def sizes_of(grouping, N):
    return jnp.asarray([max(1, int(part * N)) if part else 0 for part in GROUPINGS[grouping]], jnp.int32)


def both(kind, x_ND, w, sizes_E, ct):
    run = functools.partial(FUNCTIONS[kind], implementation="mosaic")
    y, back = jax.vjp(lambda x, w: run(x, w, sizes_E), x_ND, w)
    return y, *back(ct)


# --- the schedule ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def tiles_of(sizes_E, N, tile):
    return schedule(sizes_E, N, tile)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.lists(
        st.one_of(st.just(0), st.integers(0, 9), st.integers(60, 70), st.integers(0, 200)),
        min_size=6,
        max_size=6,
    ),
    N=st.sampled_from([1, 17, 64, 300]),
    tile=st.sampled_from([64, 128]),
)
def test_tiles_cover_every_row_once_and_never_two_groups(sizes, N, tile):
    ends = np.minimum(np.cumsum(sizes), N)
    sizes = np.diff(ends, prepend=0)
    tiles, live = map(np.asarray, tiles_of(jnp.asarray(sizes, jnp.int32), N, tile))
    assert live[0] <= tiles.shape[1] == most_tiles(N, 6, tile)
    owner = np.full(N, -1)
    for expert, row, rows in tiles[:, : live[0]].T:
        assert 1 <= rows <= tile
        assert (owner[row : row + rows] == -1).all()
        owner[row : row + rows] = expert
    np.testing.assert_array_equal(owner, np.repeat(np.arange(7), [*sizes, N - ends[-1]]))


@pytest.mark.parametrize("name", [*DEVICE_SHAPES, *INTERPRETED])
def test_tiles_fit_shared_memory_and_the_widths(name):
    shape = SHAPES[name]
    kinds = {"grouped_matmul": ("forward",), "grouped_swiglu": ("swiglu", "swiglu+")}[shape.kind]
    for kind, width in [*((k, shape.outputs) for k in kinds), ("dx", shape.inputs)]:
        tile = default_tile(kind, shape.rows, shape.experts, width)
        assert width % tile.columns == 0 and tile.warpgroup[1] % LINE == 0 == tile.warpgroup[0] % LINE
        assert tile.shared_bytes(shape.parts if kind != "dx" else 1) <= SHARED_BYTES
    tile = default_gradient_tile(shape.inputs)
    assert shape.inputs % tile.columns == 0 == shape.parts * shape.outputs % tile.rows
    assert tile.rows == CONSUMERS * LINE and tile.shared_bytes() <= SHARED_BYTES


# --- the kernels, lowered for a GPU that is not here -------------------------------------------------------


@pytest.mark.skipif(shim.why_not_mosaic() is not None, reason=str(shim.why_not_mosaic()))
@pytest.mark.parametrize("name", ["v3_gate_up", "a3b_down"])
def test_forward_and_backward_are_the_kernels_and_nothing_dense_or_transposed(name):
    case = next(c for c in cases() if c.shape == name and c.program in ("backward", "dx"))
    with shim.compiling_for():
        run = jax.jit(functools.partial(both, SHAPES[name].kind))
        unchecked = [export.DisabledSafetyCheck.custom_call(f"mosaic_gpu{v}") for v in ("", "_v2")]
        text = export.export(run, platforms=["cuda"], disabled_checks=unchecked)(
            *case.arguments
        ).mlir_module()
    # Forward (with gate and up kept), dX, dW.
    assert text.count("custom_call @mosaic_gpu") == 3
    assert "dot_general" not in text and "stablehlo.transpose" not in text


# --- the kernels, interpreted ------------------------------------------------------------------------------


def draw(shape, seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    x, w, _ = shape.arrays(dtype)
    out = jnp.asarray(rng.standard_normal((shape.rows, shape.outputs)), dtype)
    x_ND = jnp.asarray(rng.standard_normal(x.shape), dtype)
    return x_ND, jnp.asarray(rng.standard_normal(w.shape) / shape.inputs**0.5, dtype), out


@functools.partial(jax.jit, static_argnames=("kind", "implementation"))
def value_and_gradients(x_ND, w, sizes_E, ct, kind, implementation):
    run = functools.partial(FUNCTIONS[kind], implementation=implementation)
    _, back = jax.vjp(lambda x, w: run(x, w, sizes_E), x_ND, w)
    return run(x_ND, w, sizes_E), *back(ct)


def interpreted(shape, sizes_E, x_ND, w, ct):
    with shim.interpret():
        return jax.tree.map(np.asarray, value_and_gradients(x_ND, w, sizes_E, ct, shape.kind, "mosaic"))


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "grouping"),
    [(n, g) for n in INTERPRETED for g in GROUPINGS if n == "interpret" or g in ("ragged", "hot")],
)
def test_forward_dx_and_dw_against_float32(name, grouping):
    shape = SHAPES[name]
    x_ND, w, ct = draw(shape)
    sizes_E = sizes_of(grouping, shape.rows)
    got = interpreted(shape, sizes_E, x_ND, w, ct)
    x32, w32, ct32 = (a.astype(jnp.float32) for a in (x_ND, w, ct))
    want = value_and_gradients(x32, w32, sizes_E, ct32, shape.kind, "reference")
    for label, g, r in zip(("y", "dx", "dw"), got, want, strict=True):
        r = np.asarray(r)
        assert g.dtype == jnp.bfloat16 and np.isfinite(g.astype(np.float32)).all(), label
        # One rounding to bfloat16 (2^-9) of the result, and of what a backward pass is handed.
        bound = 2**-7 * np.abs(r) + 2**-8 * (np.abs(r).max() if r.any() else 0)
        assert (np.abs(g.astype(np.float32) - r) <= bound).all(), label
    dead = int(sizes_E.sum())
    assert not got[0][dead:].any() and not got[1][dead:].any()
    assert not got[2][np.asarray(sizes_E) == 0].any()


TILES = {
    "narrow": ("swiglu", Tile(64, 64, 6, 2, "columns"), GradientTile(128, 128, 3, 1)),
    "high": ("forward", Tile(256, 128, 3, 4), GradientTile(128, 256, 3, 4)),
    "cluster": ("forward", Tile(128, 128, 3, 2, cluster=2), GradientTile(128, 128, 3, 2, cluster=2)),
    "cluster_dx": ("dx", Tile(64, 128, 3, 1, "columns", cluster=2), GradientTile(128, 256, 2, 2, cluster=2)),
}


@needs_interpreter
@pytest.mark.parametrize("name", TILES)
def test_tiles_that_tuning_may_choose(name):
    kind, tile, gradient_tile = TILES[name]
    shape = Shape(150, 5, 256, 256, "grouped_swiglu" if kind == "swiglu" else "grouped_matmul")
    x_ND, w, ct = draw(shape)
    sizes_E = sizes_of("ragged", shape.rows)
    with shim.interpret():
        got = [
            np.asarray(product(x_ND, w, sizes_E, tile, kind)[0], np.float32),
            np.asarray(weight_gradient(x_ND, ct, sizes_E, gradient_tile), np.float32),
        ]
    w32 = w.astype(jnp.float32).swapaxes(1, 2) if kind == "dx" else w.astype(jnp.float32)
    x32 = x_ND.astype(jnp.float32)
    plain = jax.vjp(lambda w: grouped_matmul(x32, w, sizes_E), jnp.zeros((5, 256, 256)))[1]
    want = FUNCTIONS[shape.kind](x32, w32, sizes_E), plain(ct.astype(jnp.float32))[0]
    for g, r in zip(got, want, strict=True):
        np.testing.assert_allclose(g, r, atol=2**-8 * np.abs(r).max(), rtol=2**-7)


@needs_interpreter
def test_float16():
    shape = SHAPES["interpret_gate_up_few"]
    x_ND, w, ct = draw(shape, dtype=jnp.float16)
    sizes_E = sizes_of("ragged", shape.rows)
    got = interpreted(shape, sizes_E, x_ND, w, ct)
    want = value_and_gradients(x_ND, w, sizes_E, ct, shape.kind, "reference")
    for g, r in zip(got, want, strict=True):
        assert g.dtype == np.float16
        np.testing.assert_allclose(g.astype(np.float32), np.asarray(r, np.float32), atol=0.02, rtol=0.01)


@needs_interpreter
def test_a_row_is_bitwise_independent_of_company_and_place():
    shape = SHAPES["interpret"]
    x_ND, w, _ = draw(shape)
    at = {}
    for seed, grouping in enumerate(("edges", "ragged")):
        sizes_E = sizes_of(grouping, shape.rows)
        # The same 20 rows go to expert 3 each time, at its end, among others.
        end = int(np.cumsum(sizes_E)[3])
        rows = draw(shape, seed=seed + 5)[0].at[end - 20 : end].set(x_ND[:20])
        with shim.interpret():
            at[grouping] = np.asarray(grouped_matmul(rows, w, sizes_E, implementation="mosaic"))[
                end - 20 : end
            ]
    np.testing.assert_array_equal(at["edges"].view(np.uint16), at["ragged"].view(np.uint16))


@needs_interpreter
def test_weights_of_experts_without_rows_and_rows_of_nobody_are_not_used():
    shape = SHAPES["interpret_gate_up"]
    x_ND, w, ct = draw(shape)
    sizes_E = sizes_of("ragged", shape.rows)
    dead = int(sizes_E.sum())
    want = interpreted(shape, sizes_E, x_ND, w, ct)
    poisoned = interpreted(
        shape, sizes_E, x_ND.at[dead:].set(1e30), w.at[1].set(jnp.nan), ct.at[dead:].set(jnp.nan)
    )
    for a, b in zip(want, poisoned, strict=True):
        np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))


@needs_interpreter
@pytest.mark.parametrize("name", ["interpret", "interpret_gate_up_few"])
def test_no_races(name):
    shape = SHAPES[name]
    x_ND, w, ct = draw(shape)
    with shim.interpret(detect_races=True):
        jax.block_until_ready(
            value_and_gradients(x_ND, w, sizes_of("ragged", shape.rows), ct, shape.kind, "mosaic")
        )


@needs_interpreter
def test_an_expert_layer_inside_shard_map():
    """Dispatch, fused gate and up, down. On one device: the interpreter mixes up the barriers of several."""
    N, E, K, D, F = 24, 4, 2, 128, 128
    rng = np.random.default_rng(3)
    x_ND = jnp.asarray(rng.standard_normal((N, D)), jnp.bfloat16)
    gate_up = jnp.asarray(rng.standard_normal((E, 2, F, D)) / D**0.5, jnp.bfloat16)
    down = jnp.asarray(rng.standard_normal((E, D, F)) / F**0.5, jnp.bfloat16)
    experts_NK = jnp.asarray(np.stack([rng.permutation(E)[:K] for _ in range(N)]), jnp.int32)
    weights_NK = jnp.full((N, K), 1 / K, jnp.float32)

    def layer(x, experts, weights, gate_up, down, implementation):
        def compute(rows, sizes):
            hidden = grouped_swiglu(rows, gate_up, sizes, implementation=implementation)
            return grouped_matmul(hidden, down, sizes, implementation=implementation)

        return dispatch_experts(x, experts, weights, compute, dispatch=None, num_experts=E)[0]

    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    cut = PartitionSpec("expert")

    def run(implementation):
        body = functools.partial(layer, implementation=implementation)
        sharded = jax.shard_map(body, mesh=mesh, in_specs=(cut,) * 5, out_specs=cut, check_vma=False)
        return np.asarray(jax.jit(sharded)(x_ND, experts_NK, weights_NK, gate_up, down), np.float32)

    want = run("reference")
    with shim.interpret():
        got = run("mosaic")
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
