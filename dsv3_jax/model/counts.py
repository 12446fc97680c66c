"""Counts derived from the abstract parameter tree; there is no second list of parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel import axes_of

GROUPS = (
    "embedding",
    "attention",
    "indexer",
    "dense feed-forward",
    "router",
    "routed experts",
    "shared experts",
    "norms",
    "head",
    "multi-token module",
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree.

    Attributes:
      path: e.g. "params/moe/attention/q_b_HQA".
      letters: its dimension letters, the layer axis included.
      shape: sizes of these dimensions.
      group: one of GROUPS.
    """

    path: str
    letters: tuple[str, ...]
    shape: tuple[int, ...]
    group: str

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def leaves(cfg: ModelConfig) -> list[Leaf]:
    """Every leaf of the model, in order of paths."""
    flat = flatten_paths(abstract_variables(cfg))
    return [Leaf(path, axes_of(path, leaf), leaf.shape, _group(path)) for path, leaf in flat.items()]


def _group(path: str) -> str:
    name = path.rsplit("/", 1)[1]
    # First match decides: the multi-token module is one group whatever is inside it.
    tests: tuple[tuple[bool, str], ...] = (
        (path.split("/")[1] == "mtp", "multi-token module"),
        ("/indexer/" in path, "indexer"),
        ("/experts/" in path, "routed experts"),
        ("/shared/" in path, "shared experts"),
        ("/router/router_" in path or path.startswith("router/"), "router"),
        ("norm" in name, "norms"),
        ("/attention/" in path, "attention"),
        ("/mlp/" in path, "dense feed-forward"),
        (name.startswith("embed"), "embedding"),
        (name.startswith("head"), "head"),
    )
    return next(group for matches, group in tests if matches)


def total(items: Iterable[Leaf], *, mtp: bool = True) -> int:
    """Number of parameters, with or without the multi-token module."""
    return sum(leaf.size for leaf in items if mtp or leaf.group != "multi-token module")


def active_parameters(cfg: ModelConfig, items: Iterable[Leaf]) -> dict[str, int]:
    """Parameters that take part in the forward pass of one token of the main model.

    Everything counts but the routed experts that were not chosen, of which num_experts_per_tok / n_routed_experts
    remain.

    Returns:
      "all": with embedding and head. "without_embedding": the embedding is a lookup of one row; published figures
      (V3: 37B) count like this. "without_embedding_and_head": the layers alone.
    """
    counts = dict.fromkeys(GROUPS, 0)
    for leaf in items:
        counts[leaf.group] += leaf.size
    counts.pop("multi-token module")
    if cfg.num_moe_layers:
        counts["routed experts"] = counts["routed experts"] * cfg.num_experts_per_tok // cfg.n_routed_experts
    every = sum(counts.values())
    head = counts["embedding"] if cfg.tie_word_embeddings else counts["head"]
    layers = every - counts["embedding"] - counts["head"]
    return {"all": every, "without_embedding": layers + head, "without_embedding_and_head": layers}


def flops_per_token(cfg: ModelConfig, items: Iterable[Leaf], context: int) -> dict[str, float]:
    """Floating-point operations of the forward pass of one token of the main model.

    matmul: 2 per active parameter of every matrix (embedding excluded: a lookup; norms and biases excluded).
    attention_mean: a sequence of `context` tokens processed whole in the expanded form, mean over its tokens:
      per layer 2 H (Q + U) keys, where a token at position t sees t + 1 keys (at most index_topk with an indexer).
    attention_decode: the token after `context` cached ones in the absorbed form: per layer 2 H (J + C) keys.
    An indexer adds 2 Y Z a cached token. Softmax, norms and activations are left out (below 1 %).
    forward and decode are the sums; train is 3 forward, recomputation not counted.
    """
    items = list(items)
    matmul = 0.0
    for leaf in items:
        matrix = len([letter for letter in leaf.letters if letter != "L"]) > 1
        if not matrix or leaf.group == "multi-token module":
            continue
        if leaf.group == "embedding" and not cfg.tie_word_embeddings:
            continue
        chosen = cfg.num_experts_per_tok / cfg.n_routed_experts if leaf.group == "routed experts" else 1
        matmul += 2 * leaf.size * chosen
    H, C, R, L = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.num_hidden_layers
    limit = cfg.index_topk if cfg.has_indexer else context
    index = 2 * cfg.index_n_heads * cfg.index_head_dim
    mean = L * _attention_mean(cfg, context)
    decode = L * (2 * H * (C + R + C) * min(limit, context) + index * context)
    return {
        "matmul": matmul,
        "attention_mean": mean,
        "attention_decode": decode,
        "forward": matmul + mean,
        "decode": matmul + decode,
        "train": 3 * (matmul + mean),
    }


def _attention_mean(cfg: ModelConfig, context: int) -> float:
    """Operations of one layer's attention for one token, mean over a sequence of `context` tokens, expanded form."""
    H, Q, U = cfg.num_attention_heads, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim
    limit = cfg.index_topk if cfg.has_indexer else context
    short = min(limit, context)  # positions before this see all earlier tokens
    mean_keys = (short * (short + 1) / 2 + (context - short) * limit) / context
    index = 2 * cfg.index_n_heads * cfg.index_head_dim
    return 2 * H * (Q + U) * mean_keys + index * (context + 1) / 2


def train_flops_per_token(cfg: ModelConfig, context: int) -> float:
    """Operations of one token of a training step: forward and backward, the multi-token module included.

    Three times the forward pass; recomputation and the optimiser are not counted, as is usual for the utilisation of
    a device. A token of a packed row counts as one of a sequence of `context` tokens.
    """
    items = leaves(cfg)
    forward = flops_per_token(cfg, items, context)["forward"]
    depth = cfg.num_nextn_predict_layers
    for leaf in items:
        name = leaf.path.rpartition("/")[2]
        matrix = len([letter for letter in leaf.letters if letter != "L"]) > 1
        if leaf.group == "multi-token module" and matrix and not name.startswith("embed"):
            routed = "/experts/" in leaf.path
            forward += 2 * leaf.size * (cfg.num_experts_per_tok / cfg.n_routed_experts if routed else 1)
    if depth and not cfg.mtp_own_head:
        forward += 2 * depth * cfg.vocab_size * cfg.hidden_size
    return 3 * (forward + depth * _attention_mean(cfg, context))


def cache_bytes_per_token(cfg: ModelConfig, bytes_per_value: int) -> int:
    """Latent cache of one token over all layers of the main model: C + R values, and Z index values (V3.2)."""
    values = cfg.kv_lora_rank + cfg.qk_rope_head_dim + (cfg.index_head_dim if cfg.has_indexer else 0)
    return cfg.num_hidden_layers * values * bytes_per_value


def bytes_per_device(
    items: Iterable[Leaf], specs: dict[str, Any], axis_sizes: dict[str, int], width: int
) -> int:
    """Bytes a device holds of all leaves, `width` bytes a parameter, cut by their specs."""
    held = 0
    for leaf in items:
        parts = 1
        for entry in specs[leaf.path]:
            for axis in (entry,) if isinstance(entry, str) else entry or ():
                parts *= axis_sizes[axis]
        held += leaf.size // parts * width
    return held
