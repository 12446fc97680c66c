"""What factoring an expert's moments once saves: `python -m benchmarks.gptq_factors`.

Processor seconds of rounding some experts to int4:64, with a factor for each matrix (as it is) and for each piece of
8 MiB (as it was), in turn, on matrices of the ~113M shape (one piece each) and of V2-Lite's experts (six pieces), with
random inputs; and how often a factor was made. Writes benchmarks/results/gptq_factors.json.
"""

from __future__ import annotations

import functools
import statistics
import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import environment, write
from dsv3_jax.quantization import gptq
from dsv3_jax.quantization.formats import parse_format

# Experts, rows (gate and up), columns.
SHAPES = {"113M": (32, 512, 512), "V2-Lite": (4, 2816, 2048)}
ROUNDS = 3


class _EachPiece(gptq._Shared):
    """Factors made anew for every piece."""

    def __enter__(self) -> list[gptq.Factor]:
        return [make() for make in self._make]


def main() -> None:
    """See the module's text."""
    result: dict[str, Any] = {"environment": environment(), "rounds": ROUNDS, "rows": []}
    for name, (experts, rows, columns) in SHAPES.items():
        rng = np.random.default_rng(0)
        matrices = rng.standard_normal((experts, rows, columns)).astype(np.float32)
        x = rng.standard_normal((columns + 64, columns)) * rng.uniform(0.1, 3, columns)
        moments, made = x.T @ x, []

        def factor_of(i: int, made: list[int], moments: np.ndarray) -> gptq.Factor:
            made.append(i)
            return gptq.factor(moments * (i + 1), act_order=True)

        seconds: dict[str, list[float]] = {"each matrix": [], "each piece": []}
        count = {}
        for _ in range(ROUNDS):
            for way in seconds:
                made.clear()
                start = time.process_time()
                with mock.patch.object(gptq, "_Shared", _EachPiece) if way == "each piece" else nullcontext():
                    made_by = functools.partial(factor_of, made=made, moments=moments)
                    gptq.gptq_each(matrices, made_by, parse_format("int4:64"))
                seconds[way].append(time.process_time() - start)
                count[way] = len(made)
        medians = {way: statistics.median(found) for way, found in seconds.items()}
        shape = {"shape": name, "experts": experts, "rows": rows, "columns": columns}
        result["rows"].append({**shape, "factors": count, "cpu_seconds": medians, "each_round": seconds})
        print(result["rows"][-1], flush=True)
    print(write("gptq_factors", result))


if __name__ == "__main__":
    main()
