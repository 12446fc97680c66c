"""CPU cost of the expert-dispatch backends on simulated devices: `python -m benchmarks.dispatch`.

One expert layer, forward and backward, float32, the tokens of 8 devices, against the same tokens and experts on one
device. Simulated devices share the machine's cores and its memory is their network: the figures show what sorting,
copying and padding cost in processor time, nothing about links. `hot` sends every token to one expert first.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEVICES = 8
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
)

import jax  # noqa: E402  (devices come first)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from benchmarks.common import environment, write  # noqa: E402
from dsv3_jax.config import MeshConfig  # noqa: E402
from dsv3_jax.kernels.grouped_matmul import grouped_matmul  # noqa: E402
from dsv3_jax.parallel import make_mesh  # noqa: E402
from dsv3_jax.parallel.dispatch import Dispatch, dispatch_experts  # noqa: E402

TOKENS, EXPERTS, CHOICES, WIDTH, HIDDEN = 4096, 32, 4, 256, 256


def gradients(how: Dispatch | None, x: Any, experts: Any, weights: Any, gate_up: Any, down: Any) -> Any:
    """d sum(y^2) of one device's tokens."""

    def loss(x: Any, weights: Any, gate_up: Any, down: Any) -> Any:
        def compute(rows: Any, sizes: Any) -> Any:
            gate, up = jnp.split(grouped_matmul(rows, gate_up, sizes), 2, axis=-1)
            return grouped_matmul(jax.nn.silu(gate) * up, down, sizes)

        y, _ = dispatch_experts(x, experts, weights, compute, dispatch=how, num_experts=EXPERTS)
        return jnp.sum(y**2)

    return jax.grad(loss, argnums=(0, 1, 2, 3))(x, weights, gate_up, down)


def inputs(hot: bool) -> tuple[np.ndarray, ...]:
    """x, choices, weights and the experts' matrices."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :CHOICES]
    if hot:
        chosen = np.where(chosen == 5, chosen[:, :1], chosen)
        chosen[:, 0] = 5
    normal = lambda *shape: (0.1 * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    weights = np.full((TOKENS, CHOICES), 1 / CHOICES, np.float32)
    matrices = normal(EXPERTS, 2 * HIDDEN, WIDTH), normal(EXPERTS, WIDTH, HIDDEN)
    return normal(TOKENS, WIDTH), chosen.astype(np.int32), weights, *matrices


def program(backend: str) -> Any:
    """The compiled layer: "one device", or a backend over all simulated ones."""
    if backend == "one device":
        return jax.jit(functools.partial(gradients, None))
    tokens, shard = P("expert"), P("expert")
    how = Dispatch(size=DEVICES, backend=backend)  # type: ignore[arg-type]
    sharded = jax.shard_map(
        functools.partial(gradients, how),
        mesh=make_mesh(MeshConfig(expert=DEVICES)),
        in_specs=(tokens, tokens, tokens, shard, shard),
        out_specs=(tokens, tokens, shard, shard),
        check_vma=False,
    )
    return jax.jit(sharded)


def main() -> None:
    """Time all in turn and write results/dispatch-simulated.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    programs = {name: program(name) for name in ("one device", "gather", "all_to_all")}
    rows = []
    for routing in ("even", "hot"):
        arguments = inputs(routing == "hot")
        cpu: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(args.rounds + 1):  # the first round compiles
            for name, run in programs.items():
                start = time.process_time()
                jax.block_until_ready(run(*arguments))
                if number:
                    cpu[name].append(time.process_time() - start)
        rows += [
            {"routing": routing, "backend": name, "cpu_s_median": statistics.median(s), "cpu_s_min": min(s)}
            for name, s in cpu.items()
        ]
    shape = {"tokens": TOKENS, "experts": EXPERTS, "choices": CHOICES, "width": WIDTH, "hidden": HIDDEN}
    for row in rows:
        print(row)
    print(
        write(
            "dispatch-simulated",
            {
                "environment": environment(),
                "devices": DEVICES,
                "shape": shape,
                "rounds": args.rounds,
                "rows": rows,
            },
        )
    )


if __name__ == "__main__":
    main()
