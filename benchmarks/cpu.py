"""CPU benchmark against transformers: `python -m benchmarks.cpu` (needs the extra `parity`).

One ~113M-parameter DeepSeek-V3 shape, float32, two threads, the same weights on both sides, checked to give the
same logits first. Rivals take turns; ratios are per round. torch runs with the fastest of its attention and
expert settings, found in the same run.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import jax  # noqa: E402  (thread settings come first)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM  # noqa: E402

from benchmarks.common import environment, interleave, paired_ratio, write  # noqa: E402
from dsv3_jax.checkpoint.source import open_source  # noqa: E402
from dsv3_jax.config import TrainingConfig  # noqa: E402
from dsv3_jax.inference import steps  # noqa: E402
from dsv3_jax.inference.device import Device  # noqa: E402
from dsv3_jax.inference.settings import EngineOptions, pages_of  # noqa: E402
from dsv3_jax.inference.table import RowTable  # noqa: E402
from dsv3_jax.inference.weights import unstack_layers  # noqa: E402
from dsv3_jax.model import Transformer, abstract_variables  # noqa: E402
from dsv3_jax.training.losses import loss_fn  # noqa: E402

SHAPE = dict(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    n_shared_experts=1,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=256,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
)

TARGETS = {"train": 1.0, "prefill": 1.0, "decode batch 1": 2.0, "decode batch 16": 1.5}
ATTENTION = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "eager", "batched_mm")
TRAIN_SHAPE, PREFILL_SHAPE = (4, 512), (4, 512)
PROMPT, NEW_TOKENS = 256, 16
PAGE, TILE = 64, 64
CALL = 8
"""Tiles of a prefill call: 512 tokens, whose temporaries malloc keeps. Those of 2,048 (93 MB a layer) go back to the
kernel after each layer, and come again page by page: a fifth of the CPU time."""

Run = Callable[[], None]


class Ours:
    """The jitted programs of training and of the decode engine."""

    def __init__(self, folder: Path):
        source = open_source(folder, abstract_variables)
        self.cfg = source.cfg
        self.variables = jax.tree.map(jnp.asarray, source.load("float32"))
        self.model = Transformer(self.cfg)
        self.weights = unstack_layers(self.cfg, self.variables)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        def run(variables: Any, tokens: jax.Array) -> jax.Array:
            hidden = self.model.apply(variables, tokens).hidden_BTD
            return self.model.apply(variables, hidden, method="logits")

        return np.asarray(jax.jit(run)(self.variables, tokens))

    def train(self, tokens: np.ndarray) -> Run:
        B, T = tokens.shape
        batch = {
            "tokens_BT": jnp.asarray(tokens),
            "targets_BT": jnp.asarray(np.concatenate([tokens[:, 1:], np.full((B, 1), -1)], axis=1)),
            "segments_BT": jnp.ones((B, T), jnp.int32),
            "positions_BT": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        }
        params, router = self.variables["params"], self.variables["router"]
        training = TrainingConfig(remat="none", balance_loss_alpha=0.0)

        @jax.jit
        def gradients(params: Any) -> Any:
            return jax.value_and_grad(loss_fn, has_aux=True)(params, router, batch, self.cfg, training)

        return lambda: jax.block_until_ready(gradients(params))

    def _device(self, batch: int, length: int) -> tuple[Device, np.ndarray]:
        """The engine's programs for a batch of prompts of one length, and the pages of each row."""
        pages = pages_of(length + 2 * NEW_TOKENS, PAGE)
        options = EngineOptions(
            rows=batch,
            page_size=PAGE,
            pages=batch * pages + 1,
            context=pages * PAGE,
            prefill_tiles=min(batch * length // TILE, CALL),
            tile=TILE,
            steps_per_call=NEW_TOKENS,
            max_logprobs=None,
            cache_dtype="float32",
        )
        device = Device(self.cfg, self.weights, options, eos_ids=[], vocab_limit=self.cfg.vocab_size)
        return device, 1 + np.arange(batch * pages, dtype=np.int32).reshape(batch, pages)

    def _fill(self, device: Device, tables_BM: np.ndarray, tokens: np.ndarray) -> jax.Array:
        """Whole prompts in calls of up to `CALL` tiles; the last hidden states [B, D]."""
        B, T = tokens.shape
        tiles, per_prompt = B * T // TILE, T // TILE
        tokens_BT = tokens.reshape(-1, TILE).astype(np.int32)
        positions_BT = np.tile(np.arange(T, dtype=np.int32).reshape(-1, TILE), (B, 1))
        tables = np.repeat(tables_BM, per_prompt, axis=0)
        ends = np.arange(1, 1 + tiles) % per_prompt == 0
        rows_B = np.where(ends, np.arange(tiles) // per_prompt, B).astype(np.int32)
        last_B, call = np.full(tiles, TILE - 1, np.int32), min(tiles, CALL)
        hidden_BD = []
        for at in range(0, tiles, call):
            part = slice(at, at + call)
            arrays = (tokens_BT, positions_BT, tables, last_B, rows_B)
            hidden_BD.append(device.prefill(*(array[part] for array in arrays))[1])
        return functools.reduce(jnp.add, hidden_BD)  # a row's is in one of them, zeros in the others

    def prefill(self, tokens: np.ndarray) -> Run:
        head = jax.jit(lambda top, hidden_BD: self.model.apply(top, hidden_BD[:, None], method="logits"))
        device, tables_BM = self._device(*tokens.shape)

        def run() -> None:
            jax.block_until_ready(head(self.weights.top, self._fill(device, tables_BM, tokens)))

        return run

    def decode(self, tokens: np.ndarray) -> Run:
        """NEW_TOKENS greedy steps of the engine from a filled cache, always from the same position."""
        B, T = tokens.shape
        device, tables_BM = self._device(B, T)
        self._fill(device, tables_BM, tokens)
        state = steps.State(
            token_B=tokens[:, -1].astype(np.int32),
            position_B=np.full(B, T - 1, np.int32),
            left_B=np.full(B, 10 * NEW_TOKENS, np.int32),
            reason_B=np.full(B, steps.LIVE, np.int32),
        )
        known_TB = np.full((NEW_TOKENS, B), steps.NO_TOKEN, np.int32)
        choosing = RowTable(B, tables_BM.shape[1], self.cfg.vocab_size).choosing()
        tables = jnp.asarray(tables_BM)

        def run() -> None:
            _, produced = device.decode(
                state, tables, known_TB, choosing, wanted=False, limit=NEW_TOKENS, until_one_ends=False
            )
            assert int((produced.token_TB >= 0).sum()) == NEW_TOKENS * B, "a row ended early"

        return run


class Theirs:
    """transformers with one choice of attention and experts."""

    def __init__(self, folder: Path, attention: str, experts: str):
        self.model = DeepseekV3ForCausalLM.from_pretrained(
            folder, attn_implementation=attention, experts_implementation=experts, dtype=torch.float32
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.from_numpy(tokens)).logits.numpy()

    def train(self, tokens: np.ndarray) -> Run:
        ids = torch.from_numpy(tokens)

        def run() -> None:
            self.model.zero_grad(set_to_none=True)
            self.model(ids, labels=ids).loss.backward()

        return run

    def prefill(self, tokens: np.ndarray) -> Run:
        ids = torch.from_numpy(tokens)

        @torch.no_grad()
        def run() -> None:
            self.model(ids, use_cache=True, logits_to_keep=1)

        return run

    def decode(self, tokens: np.ndarray) -> Run:
        ids = torch.from_numpy(tokens)
        full = None
        with torch.no_grad():
            for piece in ids.split(4, dim=1):  # batched_mm gathers a weight matrix per token: few at a time
                full = self.model(
                    piece, past_key_values=full, use_cache=True, logits_to_keep=1
                ).past_key_values

        @torch.no_grad()
        def run() -> None:
            cache, token = full, ids[:, -1:]
            for _ in range(NEW_TOKENS):
                out = self.model(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            cache.crop(-NEW_TOKENS)

        return run


def make_model(folder: Path) -> None:
    """The random model both sides read."""
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE)).float().save_pretrained(folder)


def fastest(folder: Path, job: str, tokens: np.ndarray) -> tuple[str, Theirs, dict[str, float]]:
    """Their best setting for a job: the lowest of two timed calls each."""
    seconds: dict[str, float] = {}
    for attention in ATTENTION:
        for experts in EXPERTS:
            if experts == "batched_mm" and tokens.size > 1024 and job != "decode":
                continue  # it gathers a weight matrix per token: gigabytes at this size
            model = Theirs(folder, attention, experts)
            times = interleave({"": getattr(model, job)(tokens)}, rounds=2)[""]
            seconds[f"{attention}, {experts}"] = min(times)
            del model
    best = min(seconds, key=lambda name: seconds[name])
    return best, Theirs(folder, *best.split(", ")), seconds


def main() -> None:
    """Run every job and write results/cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--output", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    result: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "shape": SHAPE, "jobs": []}
    rng = np.random.default_rng(0)

    def ids(shape: tuple[int, int]) -> np.ndarray:
        return rng.integers(2, SHAPE["vocab_size"], shape)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        ours = Ours(folder)
        probe = ids((2, 64))
        difference = float(np.abs(ours.logits(probe) - Theirs(folder, "eager", "eager").logits(probe)).max())
        assert difference <= 1e-4, f"logits differ by {difference}"
        result["max_logit_difference"] = difference
        shapes = {
            "train": TRAIN_SHAPE,
            "prefill": PREFILL_SHAPE,
            "decode batch 1": (1, PROMPT),
            "decode batch 16": (16, PROMPT),
        }
        for job in args.only:
            method, tokens = job.split()[0], ids(shapes[job])
            settings, theirs, tried = fastest(folder, method, tokens)
            seconds = interleave(
                {"ours": getattr(ours, method)(tokens), "theirs": getattr(theirs, method)(tokens)},
                args.rounds,
            )
            count = tokens.shape[0] * NEW_TOKENS if method == "decode" else tokens.size
            row = {
                "name": job,
                "target": TARGETS[job],
                "tokens": count,
                "their_settings": settings,
                "their_settings_tried_s": tried,
                "seconds": seconds,
                "ours_tokens_per_s": count / statistics.median(seconds["ours"]),
                "theirs_tokens_per_s": count / statistics.median(seconds["theirs"]),
                "ratio": paired_ratio(seconds["ours"], seconds["theirs"]),
            }
            result["jobs"].append(row)
            print(
                f"{job:16} ours {row['ours_tokens_per_s']:8.1f}/s  theirs {row['theirs_tokens_per_s']:8.1f}/s "
                f"({settings})  ratio {row['ratio']['median']:.2f}",
                flush=True,
            )
            del theirs
            path = write(args.output, result)  # after each job: what was measured survives a kill
    print("written:", path)


if __name__ == "__main__":
    main()
