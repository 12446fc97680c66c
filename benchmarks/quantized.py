"""Quantised weights: speed and memory of decoding by format, and what each costs in quality.

    python -m benchmarks.quantized speed                       the ~113M shape, random weights, on this machine
    python -m benchmarks.quantized quality --run DIR --text FILE .. --calibration FILE [--name NAME]

`speed` starts one process a format and round, formats in turn, so that peak memory is that format's own; each loads the
same checkpoint with `--quantize`, warms up, and decodes 64 tokens for 1 and for 16 prompts. `quality` quantises a
trained checkpoint in every format, to nearest, calibrated and by other libraries (`benchmarks.quality`); texts come
from `benchmarks.texts`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.common import environment, write

FORMATS = ("float32", "int8", "fp8", "int4:64")
NEW_TOKENS, PROMPT = 64, 64


def speed(rounds: int) -> dict[str, Any]:
    """Tokens a second and peak memory by format."""
    import jax

    from dsv3_jax.checkpoint import save_checkpoint
    from dsv3_jax.config import ModelConfig
    from dsv3_jax.model import init_variables

    cfg = ModelConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=16, n_shared_experts=1, n_routed_experts=32, num_experts_per_tok=4, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in FORMATS}
    before = environment()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "model", cfg, init_variables(cfg, jax.random.key(0)))
        for _ in range(rounds):
            for name in FORMATS:
                command = [sys.executable, "-m", "benchmarks.quantized", "one", f"{folder}/model", name]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, found[name][-1], file=sys.stderr)
    rows = []
    for name, runs in found.items():
        row: dict[str, Any] = {"format": name}
        for key in runs[0]:
            row[key] = statistics.median(run[key] for run in runs)
        for batch in (1, 16):
            key = f"decode_{batch}"
            ratios = [run[key] / base[key] for run, base in zip(runs, found["float32"], strict=True)]
            row[f"{key}_ratio"] = statistics.median(ratios)
        rows.append(row)
    return {"environment": before, "rounds": rounds, "rows": rows, "runs": found}


def one(folder: str, name: str) -> dict[str, float]:
    """One format in this process."""
    import jax
    import numpy as np

    from dsv3_jax.inference.engine import Engine
    from dsv3_jax.inference.load import open_model
    from dsv3_jax.inference.options import Sampling
    from dsv3_jax.inference.requests import Request
    from dsv3_jax.inference.settings import EngineOptions

    model = open_model(folder, "float32", None if name == "float32" else name)
    weights = model.load()
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    rng = np.random.default_rng(0)
    result: dict[str, float] = {"weight_mb": nbytes / 1e6}
    for batch in (1, 16):
        engine = Engine(
            model.cfg, weights, options=EngineOptions(rows=batch, context=256, prefix_cache=False)
        )
        engine.warm()
        sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        seconds = []
        for _ in range(3):
            before = engine.stats.decode_seconds, engine.stats.decode_tokens
            for _ in range(batch):
                engine.submit(Request(rng.integers(0, 8192, PROMPT, np.int32), sampling))
            while not engine.idle:
                engine.step()
            tokens = engine.stats.decode_tokens - before[1]
            seconds.append((engine.stats.decode_seconds - before[0]) / tokens)
        result[f"decode_{batch}"] = 1 / statistics.median(seconds)
    (peak,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    result["peak_mb"] = int(peak.split()[1]) / 1e3
    return result


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    fast = kinds.add_parser("speed")
    fast.add_argument("--rounds", type=int, default=3)
    single = kinds.add_parser("one")
    single.add_argument("folder")
    single.add_argument("format")
    good = kinds.add_parser("quality")
    for flag in ("--run", "--calibration"):
        good.add_argument(flag, type=Path, required=True)
    good.add_argument("--text", type=Path, nargs="+", required=True)
    good.add_argument("--formats", nargs="+", default=["int8", "fp8", "int4:128", "int4:64", "int4a:64"])
    good.add_argument("--roundings", nargs="+")
    good.add_argument("--tokens", type=int, default=32768)
    good.add_argument("--window", type=int, default=256)
    good.add_argument("--name", default="quantized_quality")
    args = parser.parse_args()
    if args.kind == "one":
        print(json.dumps(one(args.folder, args.format)))
    elif args.kind == "speed":
        print(write("quantized_speed", speed(args.rounds)))
    else:
        from benchmarks.quality import quality

        how = (args.tokens, args.window, args.formats, args.roundings)

        def each(found: dict[str, Any]) -> Path:
            shorter = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.7g}"))
            return write(args.name, shorter)

        print(each(quality(args.run, args.text, args.calibration, *how, each=each)))


if __name__ == "__main__":
    main()
