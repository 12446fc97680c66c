"""`python -m dsv3_jax.describe`: counts, arithmetic, limits of time and memory, messages."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax.describe import active_parameters, cache_bytes_per_token, flops_per_token, leaves, total
from tests.golden.cases import CASES, with_mtp

REPO = Path(__file__).resolve().parents[2]
# Runs the module and then prints its own peak resident memory (kB) on stderr.
WRAPPER = """
import re, runpy, sys
sys.argv = ["describe", *sys.argv[1:]]
try:
    runpy.run_module("dsv3_jax.describe", run_name="__main__")
finally:
    print("VmHWM", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")
    }
    return subprocess.run(
        [sys.executable, "-c", WRAPPER, *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_671b_in_seconds_and_little_memory() -> None:
    start = os.times()
    begin = time.monotonic()
    out = run("configs/deepseek-v3.yaml", "--json", "--mesh.expert", "32", "--mesh.fsdp", "8")
    end = os.times()
    assert out.returncode == 0, out.stderr
    cpu = end.children_user + end.children_system - start.children_user - start.children_system
    # Processor time, so that a busy machine does not fail the test; the wall clock is far below on an idle one.
    assert cpu < 10 and time.monotonic() - begin < 120
    if sys.platform == "linux":
        assert int(out.stderr.split("VmHWM")[1]) < 2_000_000
    data = json.loads(out.stdout)
    assert data["parameters"]["total"] == 682_636_487_424
    experts = next(leaf for leaf in data["leaves"] if leaf["path"] == "params/moe/mlp/experts/gate_up_EPFD")
    assert experts["letters"] == "LEPFD" and experts["shape"] == [58, 256, 2, 2048, 7168]
    assert experts["storage"] == {"E": ["expert"], "D": ["fsdp"]} and experts["compute"] == {"E": ["expert"]}
    held = data["bytes"]["weights_bfloat16_per_device"]
    assert data["bytes"]["weights_bfloat16"] / 256 < held < data["bytes"]["weights_bfloat16"] / 100
    assert data["cache_bytes_per_token"]["bfloat16"] == 61 * 576 * 2


def test_the_table_names_every_leaf_and_group() -> None:
    out = run("configs/tiny.yaml", "--context", "256")
    assert out.returncode == 0, out.stderr
    for text in ("params/moe/mlp/experts/gate_up_EPFD", "L3 E16 P2 F96 D128", "multi-token module", "active per token",
                 "FLOPs per token, context 256", "cache per token"):  # fmt: skip
        assert text in out.stdout
    assert max(map(len, out.stdout.splitlines())) < 1000


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES["v32"].raw))
    out = run(str(tmp_path), "--json")
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["parameters"]["total"] == total(leaves(CASES["v32"].config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (
            ["configs/tiny.yaml", "--mesh.experts", "2"],
            "unknown argument '--mesh.experts'; did you mean '--mesh.expert'",
        ),
        (
            ["configs/tiny.yaml", "--mesh.expert", "5"],
            "D (model width) is 128, which is not divisible by the mesh axes expert = 5",
        ),
        (["configs/tiny.yaml", "--mesh.data", "0"], "mesh.data is 0"),
        (["configs/tiny.yaml", "--context", "0"], "--context is 0"),
        ([], "config"),
    ],
)
def test_wrong_arguments_exit_2_with_one_line(arguments: list[str], message: str) -> None:
    out = run(*arguments)
    assert out.returncode == 2 and out.stdout == ""
    assert out.stderr.startswith("error: ") and message in out.stderr and "Traceback" not in out.stderr


def test_active_parameters_by_hand() -> None:
    cfg = CASES["v3"].config
    items = leaves(with_mtp(CASES["v3"]))  # the module is not part of the main model's token
    D, F, E, K, V = 32, 28, 12, 3, 96
    resting = 2 * 3 * D * F * (E - K)  # two expert layers
    active = active_parameters(cfg, items)
    assert active["all"] == total(leaves(cfg)) - resting
    assert active["all"] - active["without_embedding"] == V * D
    assert active["without_embedding"] - active["without_embedding_and_head"] == V * D
    tied = CASES["v3-tied"].config
    assert active_parameters(tied, leaves(tied))["without_embedding"] == active["without_embedding"]


def test_flops_by_hand() -> None:
    """All dense, no query latent: every matrix once, every earlier key once."""
    cfg = dataclasses.replace(CASES["v3-all-dense"].config, q_lora_rank=None)
    D, H, N, R, C, U, intermediate, V, L, S = 32, 4, 14, 8, 20, 10, 44, 96, 3, 50
    matrices = (
        L * (H * (N + R) * D + (C + R) * D + H * (N + U) * C + D * H * U + 3 * D * intermediate) + V * D
    )
    flops = flops_per_token(cfg, leaves(cfg), S)
    assert flops["matmul"] == 2 * matrices
    assert flops["attention_mean"] == L * 2 * H * (N + R + U) * (S + 1) / 2
    assert flops["attention_decode"] == L * 2 * H * (C + R + C) * S
    assert flops["train"] == 3 * flops["forward"] == 3 * (flops["matmul"] + flops["attention_mean"])


def test_sparse_attention_reads_at_most_topk_keys() -> None:
    cfg = CASES["v32"].config  # top 9
    S, L, H, width, index = 40, 3, 4, 14 + 8 + 10, 2 * 32 * 12
    flops = flops_per_token(cfg, leaves(cfg), S)
    keys = sum(min(t + 1, 9) for t in range(S)) / S
    assert math.isclose(flops["attention_mean"], L * (2 * H * width * keys + index * (S + 1) / 2))
    assert flops["attention_decode"] == L * (2 * H * (20 + 8 + 20) * 9 + index * S)
    assert cache_bytes_per_token(cfg, 4) == 3 * (20 + 8 + 12) * 4
