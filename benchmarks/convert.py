"""Speed of conversion against `cp` of the same bytes on the same disk: `python -m benchmarks.convert [--dir DIR]`.

Every job ends with its data flushed to the disk, cp's too, and begins with nothing left to flush; sources are in the
page cache. The converters run in this process: what a command adds to start is the same for any size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from benchmarks.common import environment, paired_ratio, write
from convert import from_hf, to_hf
from dsv3_jax.checkpoint.atomic import fsync_tree
from dsv3_jax.config import ModelConfig
from dsv3_jax.hf.config import to_hf_config
from dsv3_jax.hf.fp8 import SCALE_SUFFIX, scale_shape
from dsv3_jax.hf.rules import hf_entries
from dsv3_jax.hf.writer import plan_shards, write_headers
from dsv3_jax.model import abstract_variables

# V2-Lite's width and expert size, fewer layers and experts: tensors of 5.8 MB, 776M parameters.
CFG = ModelConfig(
    vocab_size=16384, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=4,
    num_attention_heads=16, n_shared_experts=2, n_routed_experts=20, num_experts_per_tok=6, first_k_dense_replace=1,
    n_group=1, topk_group=1, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128,
)  # fmt: skip
BLOCK = (128, 128)
TARGETS = {"bf16: from_hf": 0.6, "bf16: to_hf": 0.6, "FP8: from_hf": 0.25}


def make(folder: Path, fp8: bool) -> int:
    """A folder of random weights, matrices in bfloat16 or FP8; its bytes."""
    folder.mkdir()
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    for entry in hf_entries(CFG, abstract_variables(CFG)):
        codes = fp8 and entry.name.endswith("_proj.weight")
        kind = "F32" if entry.path.startswith("router/") else "F8_E4M3" if codes else "BF16"
        shapes.append((entry.name, kind, entry.hf_shape))
        if codes:
            shapes.append((entry.name + SCALE_SUFFIX, "F32", scale_shape(entry.hf_shape, BLOCK)))
    layout = plan_shards(shapes, 1 << 30)
    write_headers(folder, layout)
    # No code of either type is a NaN: below 0x40 in every byte.
    noise = np.random.default_rng(0).integers(0, 0x40, 1 << 22, dtype=np.uint8)
    for place in layout.places.values():
        with (folder / place.file).open("r+b") as stream:
            stream.seek(place.offset)
            for start in range(0, place.nbytes, noise.nbytes):
                stream.write(noise[: min(noise.nbytes, place.nbytes - start)].data)
    raw = to_hf_config(CFG, dtype="bfloat16")
    if fp8:
        raw["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (folder / "config.json").write_text(json.dumps(raw))
    return layout.nbytes


def copy(src: Path, dst: Path) -> None:
    """cp -r, flushed."""
    subprocess.run(["cp", "-r", str(src), str(dst)], check=True)
    fsync_tree(dst)


def _cpu() -> float:
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in use)


def timed(jobs: dict[str, Callable[[Path], object]], folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds and CPU seconds of each job, in turn, after a round that does not count."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": []} for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            target = folder / "target"
            os.sync()
            cpu, start = _cpu(), time.perf_counter()
            job(target)
            seconds, cpu = time.perf_counter() - start, _cpu() - cpu
            shutil.rmtree(target)
            if round_:
                found[name]["seconds"].append(seconds)
                found[name]["cpu_seconds"].append(cpu)
    return found


def ceilings(folder: Path) -> dict[str, float]:
    """GB/s of CPU time of one core: SHA-256, copying into the page cache, reading from it."""
    data = np.random.default_rng(0).bytes(1 << 20)
    buffer, path, count = memoryview(bytearray(1 << 20)), folder / "probe", 256
    result = {}
    with open(path, "w+b", buffering=0) as file:
        for name, work in (
            ("sha256", lambda _: hashlib.sha256(data)),
            ("write", lambda i: os.pwrite(file.fileno(), data, i << 20)),
            ("read", lambda i: os.preadv(file.fileno(), [buffer], i << 20)),
        ):
            start = time.process_time()
            for index in range(count):
                work(index)
            result[name] = count * (1 << 20) / (time.process_time() - start) / 1e9
    path.unlink()
    return result


def main() -> None:
    """Time all jobs and write results/convert.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--output", default="convert")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "jobs": []}
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        folder = Path(name)
        sizes = {kind: make(folder / kind, kind == "fp8") for kind in ("bf16", "fp8")}
        from_hf.convert(folder / "bf16", folder / "native")
        result["bytes"] = sizes
        result["cpu_GB_per_s"] = ceilings(folder)
        measured = timed(
            {
                "cp": lambda target: copy(folder / "bf16", target),
                "bf16: from_hf": lambda target: from_hf.convert(folder / "bf16", target),
                "bf16: to_hf": lambda target: to_hf.convert(folder / "native", target),
                "FP8: from_hf": lambda target: from_hf.convert(folder / "fp8", target),
            },
            folder,
            args.rounds,
        )
    result["environment"]["load_after"] = os.getloadavg()[0]
    cp = measured["cp"]["seconds"]
    for job, values in measured.items():
        ratio = paired_ratio(values["seconds"], cp)
        row = {"name": job, "target": TARGETS.get(job), **values, "ratio": ratio}
        # All jobs write the bytes of the bf16 model.
        row["written_GB_per_s"] = sizes["bf16"] / statistics.median(values["seconds"]) / 1e9
        result["jobs"].append(row)
        cpu = statistics.median(values["cpu_seconds"])
        print(
            f"{job:14} {row['written_GB_per_s']:.3f} GB/s  ratio {ratio['median']:.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f})  {cpu:.2f} s of CPU",
            flush=True,
        )
    print(result["cpu_GB_per_s"], sizes)
    print("written:", write(args.output, result))


if __name__ == "__main__":
    main()
