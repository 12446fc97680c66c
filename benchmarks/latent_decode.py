"""What a decode step moves on the CPU: `python -m benchmarks.latent_decode` writes results/latent_decode.json.

The step of `cpu_100m` (8 layers, 16 rows) writes each row's new latent and attends over its pages, as the layer
scan of a model does. Shown: from the compiled program, which operations touch the array of all pages, and what
they give; and by time, that a step costs as much as its live slots and not as its table, beside the cache in one piece.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections import Counter
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import environment, interleave, paired_ratio, write
from dsv3_jax.kernels.mla_decode import latent_attention, paged_latent_attention, write_cache, write_pages
from dsv3_jax.kernels.mla_decode.shapes import PAGED_SHAPES, SHAPES

LAYERS = 8
SHORT, LONG = 512, 2048
SHAPE = PAGED_SHAPES["cpu_100m"]
OPTIONS: dict[str, Any] = dict(value_dim=SHAPE.latent, scale=0.08)


def paged_step(pages_NPJ: jax.Array, q_BTHJ: jax.Array, tables_BM: jax.Array, positions_BT: jax.Array) -> Any:
    """Write and attend in every layer; the results feed the next layer's queries."""

    def layer(carry, index):
        pages_NPJ, q_BTHJ = carry
        tables = tables_BM + index * (pages_NPJ.shape[0] // LAYERS)
        pages_NPJ = write_pages(pages_NPJ, q_BTHJ[:, :, 0], tables, positions_BT)
        out_BTHC = paged_latent_attention(q_BTHJ, pages_NPJ, tables, positions_BT, **OPTIONS)
        return (pages_NPJ, q_BTHJ.at[..., : SHAPE.latent].add(out_BTHC)), None

    return jax.lax.scan(layer, (pages_NPJ, q_BTHJ), jnp.arange(LAYERS))[0]


def contiguous_step(cache_LBSJ: jax.Array, q_BTHJ: jax.Array, positions_BT: jax.Array) -> Any:
    """The same over a cache in one piece."""

    def layer(carry, index):
        cache_LBSJ, q_BTHJ = carry
        cache_LBSJ = write_cache(cache_LBSJ, index, q_BTHJ[:, :, 0], positions_BT)
        out_BTHC = latent_attention(q_BTHJ, cache_LBSJ, index, positions_BT, **OPTIONS)
        return (cache_LBSJ, q_BTHJ.at[..., : SHAPE.latent].add(out_BTHC)), None

    return jax.lax.scan(layer, (cache_LBSJ, q_BTHJ), jnp.arange(LAYERS))[0]


PASSED_ON = {"parameter", "tuple", "get-tuple-element", "while"}


def touching(hlo: str, shape: tuple[int, ...]) -> Counter[str]:
    """The operations of a compiled program that read or make an array of that shape: "operation -> result".

    What only hands it on (loops and their tuples) is left out, and so is the inside of fused operations: a fusion
    is one operation that reads what it needs and keeps nothing else.
    """
    whole = f"f32[{','.join(map(str, shape))}]"
    line = re.compile(r"^\s*(?:ROOT )?%(\S+) = (\([^=]*\)|\S+?)(?:\{[\d,]*\})? ([\w-]+)\(([^)]*)\)")
    found: Counter[str] = Counter()
    for block in re.split(r"\n\n", hlo):
        if re.match(r"%(fused|wrapped)\S* \(", block):
            continue
        names = set()
        for match in filter(None, map(line.match, block.splitlines())):
            name, result, operation, operands = match.groups()
            if result == whole:
                names.add(name)
            reads = names & set(re.findall(r"%([\w.-]+)", operands))
            if operation not in PASSED_ON and (result == whole or reads):
                found[f"{operation} -> {result}"] += 1
    return found


def compiled_step(pages: int, table: int) -> Any:
    """The paged step compiled for that many pages of all layers and that many of a row."""
    q, whole, tables, positions = SHAPE._replace(pages=pages, table=table).arrays()
    return jax.jit(paged_step, donate_argnums=0).lower(whole, q, tables, positions).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds

    rng = np.random.default_rng(0)
    B, J, P = SHAPE.batch, SHAPE.latent + SHAPE.rope, SHAPE.page
    own = SHAPE.pages // LAYERS
    tables_BM = jnp.asarray(rng.permutation(own).reshape(B, SHAPE.table), jnp.int32)
    wide_BM = jnp.pad(tables_BM, ((0, 0), (0, 3 * SHAPE.table)))
    q_BTHJ = jnp.asarray(rng.standard_normal((B, 1, SHAPE.heads, J)), jnp.float32)
    state = {
        "pages": jnp.asarray(rng.standard_normal((SHAPE.pages, P, J)), jnp.float32),
        "piece": jnp.asarray(rng.standard_normal(SHAPES["cpu_100m"].arrays()[1].shape), jnp.float32),
    }
    steps = {
        "pages": jax.jit(paged_step, donate_argnums=0),
        "piece": jax.jit(contiguous_step, donate_argnums=0),
    }

    def run(kind: str, *rest: jax.Array) -> None:
        state[kind], out = steps[kind](state[kind], q_BTHJ, *rest)
        out.block_until_ready()

    last = {slots: jnp.full((B, 1), slots - 1, jnp.int32) for slots in (SHORT, LONG)}
    seconds = interleave(
        {
            "pages short": functools.partial(run, "pages", tables_BM, last[SHORT]),
            "pages long": functools.partial(run, "pages", tables_BM, last[LONG]),
            "pages short, table four times as wide": functools.partial(run, "pages", wide_BM, last[SHORT]),
            "one piece short": functools.partial(run, "piece", last[SHORT]),
            "one piece long": functools.partial(run, "piece", last[LONG]),
        },
        rounds,
    )
    text = compiled_step(SHAPE.pages, SHAPE.table)
    live = {slots: LAYERS * B * slots * J * 4 for slots in (SHORT, LONG)}
    ratios = {
        "short costs of long": paired_ratio(seconds["pages long"], seconds["pages short"]),
        "wide table, speed against narrow": paired_ratio(
            seconds["pages short, table four times as wide"], seconds["pages short"]
        ),
        "pages against one piece, short": paired_ratio(seconds["pages short"], seconds["one piece short"]),
        "pages against one piece, long": paired_ratio(seconds["pages long"], seconds["one piece long"]),
    }
    result = {
        "environment": environment(),
        "shape": {"layers": LAYERS, **SHAPE._asdict(), "short": SHORT, "long": LONG},
        "milliseconds": {name: round(1e3 * float(np.median(s)), 3) for name, s in seconds.items()},
        "live_bytes": {"short": live[SHORT], "long": live[LONG]},
        "ratios": ratios,
        "operations_on_all_pages": dict(touching(text.as_text(), (SHAPE.pages, P, J))),
        "temporary_bytes": {
            "as is": text.memory_analysis().temp_size_in_bytes,
            "ten times the pages": compiled_step(10 * SHAPE.pages, SHAPE.table)
            .memory_analysis()
            .temp_size_in_bytes,
            "all pages": 4 * SHAPE.pages * P * J,
        },
    }
    print(*(f"{name}: {value}" for name, value in result.items() if name != "environment"), sep="\n")
    print(write("latent_decode", result))


if __name__ == "__main__":
    main()
