"""Collectives are read from HLO text: kinds, groups, bytes, and how often loops run them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.planning.collectives import _groups, by_kind, parse
from dsv3_jax.planning.hlo import bytes_of

# A loop of 5 with a loop of 3 in it, whose count the compiler noted; a loop whose condition tells its count (7); one
# whose trips depend on data; and, in the entry, a fused reduce-scatter as GPUs write it, and an exchange.
LOOPS = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %ar = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %ar)
}

%outer (q: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %w = (s32[], f32[4,8]{1,0}) while(%q), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %y = bf16[4,8]{1,0} parameter(1)
  %ag = bf16[32,8]{1,0} all-gather(bf16[4,8]{1,0} %y), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %u = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}

%seven (r: (s32[], f32[4,8])) -> pred[] {
  %r = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%r), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%by_data (r: (s32[], s32[])) -> pred[] {
  %r = (s32[], s32[]) parameter(0)
  ROOT %lt = pred[] compare(%i, %j), direction=LT
}

%permuting (v: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %v = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%v), index=1
  ROOT %cp = f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}
}

%scattering (z: f32[16,8]) -> f32[4,8] {
  %z = f32[16,8]{1,0} parameter(0)
  ROOT %rs = f32[4,8]{1,0} reduce-scatter(%z), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add
}

ENTRY %main (p0: f32[4,8], p1: f32[16,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[16,8]{1,0} parameter(1)
  %l5 = (s32[], f32[4,8]{1,0}) while(%t0), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %l7 = (s32[], f32[4,8]{1,0}) while(%t0), condition=%seven, body=%permuting
  %lx = (s32[], f32[4,8]{1,0}) while(%t0), condition=%by_data, body=%inner
  %st = ((f32[16,8]{1,0}), f32[4,8]{1,0}) async-start(%p1), async_execution_thread="x", calls=%scattering
  %sd = f32[4,8]{1,0} async-done(%st)
  %gs = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p0), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %gd = f32[8,8]{1,0} all-gather-done(%gs)
  %alone = f32[4,8]{1,0} all-reduce(%p0), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %aa = f32[16,8]{1,0} all-to-all(%p1), replica_groups={}, metadata={op_name="jit(step)/exchange"}
}
"""
BLOCK = 4 * 8 * 4  # bytes of f32[4, 8]


def test_loops_multiply_and_groups_are_read() -> None:
    found = {(one.kind, one.counted, one.group): one for one in parse(LOOPS, 8)}
    assert len(found) == len(parse(LOOPS, 8)) == 7
    reduce = found["all-reduce", True, 2]
    assert (reduce.times, reduce.operand_bytes, reduce.moved) == (15, BLOCK, 15 * BLOCK)
    # The same body again in a loop whose trips depend on data: told apart, and not in the totals.
    assert found["all-reduce", False, 2].times == 1
    gather = found["all-gather", True, 8]
    assert (gather.times, gather.dtype, gather.moved) == (5, "bf16", 5 * 7 * BLOCK // 2)
    assert found["all-gather", True, 2].moved == BLOCK  # -start and -done are one
    permute = found["collective-permute", True, 2]
    assert (permute.times, permute.moved) == (7, 7 * BLOCK)
    assert found["reduce-scatter", True, 4].moved == 4 * BLOCK * 3 // 4
    assert by_kind(parse(LOOPS, 8))["all-reduce"] == 15 * BLOCK


def test_empty_groups_are_all_devices() -> None:
    (exchange,) = [one for one in parse(LOOPS, 16) if one.kind == "all-to-all"]
    assert (exchange.group, exchange.where) == (16, "jit(step)/exchange")
    assert exchange.moved == 4 * BLOCK * 15 // 16


@pytest.mark.parametrize(
    ("groups", "per_node", "moved", "network"),
    [
        ("[2,8]<=[16]", 8, 7, 0),  # a node each
        ("[1,16]<=[16]", 8, 15, 1),  # two nodes: the other node's 8 blocks come in through 8 adapters
        ("[8,2]<=[2,8]T(1,0)", 1, 1, 1),  # the same place in two nodes
        ("[2,8]<=[2,2,4]T(1,0,2)", 4, 7, 1),  # four of each node
    ],
)
def test_what_leaves_the_node_is_shared_by_its_adapters(
    groups: str, per_node: int, moved: int, network: int
) -> None:
    text = f"""ENTRY %main (p0: f32[4,8]) -> f32[8,8] {{
  %p0 = f32[4,8]{{1,0}} parameter(0)
  ROOT %ag = f32[8,8]{{1,0}} all-gather(%p0), replica_groups={groups}, dimensions={{0}}
}}
"""
    (gather,) = parse(text, 16)
    assert (gather.per_node, gather.moved, gather.network) == (per_node, moved * BLOCK, network * BLOCK)


def test_every_pair_has_its_own_bytes_in_an_exchange() -> None:
    text = """ENTRY %main (p0: f32[16,8]) -> f32[16,8] {
  %p0 = f32[16,8]{1,0} parameter(0)
  ROOT %aa = f32[16,8]{1,0} all-to-all(%p0), replica_groups=[1,16]<=[16], dimensions={0}
}
"""
    (exchange,) = parse(text, 16)
    assert exchange.network == 4 * BLOCK * 8 // 16  # the 8 of 16 blocks whose peers are elsewhere


def test_numbered_operands_are_all_counted() -> None:
    """XLA:CPU exchanges a tuple of blocks, and writes /*index=5*/ before every fifth."""
    blocks = ", ".join(f"{'/*index=5*/' if i == 5 else ''}%b{i}" for i in range(8))
    lines = [f"  %b{i} = f32[4,8]{{1,0}} parameter({i})" for i in range(8)]
    last = f"  ROOT %aa = (f32[4,8]{{1,0}}) all-to-all({blocks}), replica_groups={{{{0,1,2,3,4,5,6,7}}}}"
    (exchange,) = parse("\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines, last, "}"]), 8)
    assert (exchange.operand_bytes, exchange.group) == (8 * BLOCK, 8)


@pytest.mark.parametrize(("types", "dtype"), [(["bf16"], "bf16"), (["bf16", "f32"], "f32"), ([], "f32")])
def test_a_size_counts_as_bfloat16_only_if_it_is_never_exchanged_in_float32(
    types: list[str], dtype: str
) -> None:
    text = """ENTRY %main (p0: f32[4,8]) -> f32[16,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  ROOT %ag = f32[16,8]{1,0} all-gather(%p0), replica_groups=[2,4]<=[8], dimensions={0}
}
"""
    lowered = "\n".join(
        f'    %1 = "stablehlo.all_gather"(%0) <{{all_gather_dim = 0 : i64}}> : (tensor<4x8x{t}>) -> tensor<16x8x{t}>'
        for t in types
    )
    (gather,) = parse(text, 8, lowered)
    assert (gather.dtype, gather.operand_bytes) == (dtype, BLOCK // (2 if dtype == "bf16" else 1))


def test_bytes_of_types() -> None:
    assert bytes_of("bf16[2,8]{1,0}") == 32
    assert bytes_of("(f32[3], s4[4], pred[5], f8e4m3fn[2], token[])") == 12 + 2 + 5 + 2
    assert bytes_of("f32[]") == 4


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing\n", 8)


def test_a_real_program_counts_as_it_was_written() -> None:
    """A scan of 6 that gathers in bfloat16 and scatters in float32: XLA:CPU widens the former, the count does not."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        whole = jax.lax.all_gather(w.astype(jnp.bfloat16), "x", tiled=True)
        y = (x.astype(jnp.bfloat16) @ whole).astype(jnp.float32)
        return y, jax.lax.psum_scatter(y, "x", scatter_dimension=1, tiled=True)

    run = jax.shard_map(
        lambda x, w: jax.lax.scan(body, x, w),
        mesh=mesh,
        in_specs=(P("x"), P(None, "x")),
        out_specs=(P("x"), P(None, "x")),
        check_vma=False,
    )
    lowered = jax.jit(run).lower(np.zeros((16, 64), np.float32), np.zeros((6, 64, 64), np.float32))
    text = lowered.compile().as_text()
    found = {one.kind: one for one in parse(text, 8, lowered.as_text())}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    assert (gather.times, gather.dtype, gather.operand_bytes) == (6, "bf16", 8 * 64 * 2)
    assert (scatter.times, scatter.dtype, scatter.operand_bytes) == (6, "f32", 2 * 64 * 4)
    assert by_kind(found.values()) == {
        "all-gather": 6 * 7 * 1024,
        "reduce-scatter": 6 * 512 * 7 // 8,
    }


@pytest.mark.parametrize(
    ("mesh", "listed"),
    [
        ("mesh['data'=4,'expert'=2] {'expert'}", "[4,2]<=[8]"),
        ("mesh['data'=4,'expert'=2] {'data'}", "[2,4]<=[4,2]T(1,0)"),
        ("mesh['data'=2,'fsdp'=2,'expert'=2] {'data','expert'}", "[2,4]<=[2,2,2]T(1,0,2)"),
        ("mesh['data'=4,'expert'=2] {'data','expert'}", "[1,8]<=[8]"),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", "[2,4]<=[4,2]T(1,0)"),
    ],
)
def test_groups_by_axes_of_a_mesh_are_those_of_the_older_form(mesh: str, listed: str) -> None:
    have, want = (
        _groups(f"channel_id=1, replica_groups={form}, dimensions={{0}}", 8) for form in (mesh, listed)
    )
    np.testing.assert_array_equal(have, want)


def test_groups_in_an_unknown_form_are_an_error() -> None:
    with pytest.raises(ValueError, match="unknown form: replica_groups=torus"):
        _groups("channel_id=1, replica_groups=torus(2), dimensions={0}", 8)
