"""The MLA decode kernel interpreted over many shapes: `python -m tests.kernels.mla_interpreted` (jax 0.11 or later).

V3's columns (512 of 576) and bfloat16; every dead slot holds NaN. Each case is compared with the reference in
float32 and run once more with its rows in reverse order, which must give the same bits.
Writes docs/results/mla_interpreted.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each warpgroup waits in a thread of XLA's pool, which has as many as cores or devices: with two, all may wait.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from dsv3_jax.kernels import shim
from tests.kernels.test_mla_gpu import interpreted, random_case, reference_of

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "mla_interpreted.json"
BOUND = 0.01
EDGES = [1, 17, 63, 64, 65, 128, 0, 129]
CASES = {
    "16 heads, edges": (EDGES, dict(heads=16, page=64, table=3), dict(most=1)),
    "16 heads, edges, one piece each": (EDGES, dict(heads=16, page=64, table=3), dict(most=32)),
    "128 heads, edges": (EDGES, dict(heads=128, page=64, table=3), dict(most=2)),
    "16 heads, long rows": ([4096, 4095, 2000], dict(heads=16, page=64, table=64), dict(least=4, most=16)),
    "128 heads, one long row": ([4097], dict(heads=128, page=64, table=65), dict(least=4, most=16)),
    "two tokens, 128 heads": ([65, 2, 1, 0], dict(heads=128, page=64, table=2, tokens=2), {}),
    "four tokens, 16 heads": ([130, 67, 64, 3], dict(heads=16, page=64, table=3, tokens=4), {}),
    "five tokens, 12 heads (60 rows)": ([130, 67, 5], dict(heads=12, page=64, table=3, tokens=5), {}),
    "pages of 8": ([1, 8, 9, 100], dict(heads=16, page=8, table=16), {}),
    "pages of 16": ([16, 17, 200], dict(heads=16, page=16, table=13), {}),
    "pages of 32": ([31, 33, 200], dict(heads=16, page=32, table=7), {}),
    "pages of 128": ([127, 129, 200], dict(heads=16, page=128, table=2), {}),
    "pages of 256": ([255, 257, 300], dict(heads=16, page=256, table=2), {}),
    "1 head": ([100, 64], dict(heads=1, page=64, table=2), {}),
    "40 heads": ([100, 64], dict(heads=40, page=64, table=2), {}),
    "a prefill tile: 32 tokens, 16 heads": ([100, 32], dict(heads=16, page=64, table=2, tokens=32), {}),
}


def run(name: str) -> dict[str, float]:
    """Error of a case relative to the largest value, and seconds.

    Raises:
      AssertionError: it is beyond the bound, not finite, or depends on the rows' order.
    """
    lengths, shape, tiles = CASES[name]
    began = time.perf_counter()
    arrays = random_case(lengths, columns=576, **shape)
    got, want = interpreted(arrays, **tiles), reference_of(arrays)
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert np.isfinite(got).all() and error < BOUND, f"{name}: error {error}"
    q, pages, *rows = arrays
    backwards = interpreted((q[::-1], pages, *(a[::-1] for a in rows)), **tiles)
    assert np.array_equal(backwards[::-1], got), f"{name}: a row depends on the others' order"
    return {"error": round(error, 6), "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is written then")
    only = parser.parse_args().only
    reason = shim.why_not_interpret()
    if reason is not None:
        raise SystemExit(f"NOT RUN: {reason}")
    found = {}
    for name in CASES:
        if only in name:
            found[name] = run(name)
            print(name, found[name], flush=True)
    if not only:
        about = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "bound": BOUND}
        RESULTS.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")
        print(RESULTS)


if __name__ == "__main__":
    main()
