"""Bytes that grow with the tokens of a micro-batch, from the config's dimension letters."""

from __future__ import annotations

from typing import Any

from dsv3_jax.config import RunConfig, dims
from dsv3_jax.parallel.dispatch import make_dispatch
from dsv3_jax.training.step import shards_of

F32 = 4
# Buffers of the expert exchange over what even routing fills: parallel/exchange.py.
EXPERT_HEADROOM, PEER_HEADROOM = 2.0, 1.5
# Backward through a layer holds gradients of what it reads beside it: measured in float32 on XLA:CPU, as a multiple
# of the layer's own intermediates (docs/planning.md).
BACKWARD = 1.2


class Tokens:
    """Bytes that grow with the tokens of a micro-batch on one device."""

    def __init__(self, cfg: RunConfig, mesh: Any) -> None:
        training = cfg.training
        self.cfg, self.T = cfg, training.seq_len
        self.a_step = training.batch_size * training.seq_len // shards_of(mesh)
        self.n = self.a_step // training.accumulate
        self.c = 2 if cfg.model.dtype == "bfloat16" else F32
        self.expert = mesh.shape["expert"]
        self.d = dict(dims(cfg.model))
        for letter in "HIFM":
            self.d[letter] //= mesh.shape["tensor"]

    # --- bytes a token --------------------------------------------------------------------------------------------

    def _norm(self, width: int) -> int:
        """A norm keeps its input and its normalised value, in float32 and in the compute type."""
        return 2 * (F32 + self.c) * width

    def attention(self) -> int:
        """Norm, latents with their norms, queries, keys, values, output and log-sum-exp."""
        d, m = self.d, self.cfg.model
        size = self._norm(d["D"]) + self._norm(d["A"]) + self._norm(d["C"])
        size += 2 * self.c * d["H"] * (d["Q"] + d["U"]) + F32 * d["H"]
        if m.has_indexer and m.index_topk < self.T:
            size += self.c * d["Y"] * d["Z"] + F32 * d["Y"] + self.T
        return size

    def feed_forward(self, kind: str) -> int:
        """Norm, then the dense layer (gate, up, their activation and product), or router, experts, shared experts."""
        d = self.d
        if kind == "dense":
            return self._norm(d["D"]) + 6 * self.c * d["I"]
        size = self._norm(d["D"]) + (F32 * d["D"] if self.c < F32 else 0)
        size += (5 * F32 + 2) * d["E"]  # scores, their shares and logarithms
        size += self.experts() + 6 * self.c * d["M"]
        return size

    def experts(self) -> int:
        """Rows to the experts, gate, up, activation, product, and the rows that come back."""
        d, c, e = self.d, self.c, self.expert
        K, D, F = d["K"], d["D"], d["F"]
        if e == 1:
            return K * (c * D + 6 * c * F + F32 * D)
        rows = EXPERT_HEADROOM * K * (2 * c * D + 6 * c * F)
        return int(rows + self._exchanged() * (2 * c + F32) * D)

    def _exchanged(self) -> float:
        """Rows a device holds of others' tokens, for each of its own."""
        moe = self.cfg.moe
        dispatch = make_dispatch(self.cfg.model, self.expert, backend=moe.dispatch, platform="cuda")
        if dispatch is None:
            return 0.0
        peers = min(dispatch.fan_out, self.d["K"], self.expert)
        return self.expert if dispatch.backend == "gather" else PEER_HEADROOM * peers

    # --- bytes ----------------------------------------------------------------------------------------------------

    def kept(self) -> int:
        """What all layers keep until their backward."""
        d, c, model = self.d, self.c, self.cfg.model
        policy = self.cfg.training.remat
        if policy == "none":
            dense, moe = (self.attention() + self.feed_forward(kind) for kind in ("dense", "moe"))
        else:
            dense = c * d["D"]
            if policy == "latents":
                # attention_out is kept twice: by its name, and as the residual of its custom gradient.
                dense += c * (d["A"] + d["C"] + d["R"] + 2 * d["H"] * d["U"]) + F32 * d["H"]
            moe = dense
        size = model.num_dense_layers * dense + model.num_moe_layers * moe
        depth = model.num_nextn_predict_layers
        # The multi-token module's three norms and its projection are outside of the rematerialised block.
        size += depth * (moe + 3 * self._norm(d["D"]) + 2 * c * d["D"])
        return self.n * (size + self._norm(d["D"]))

    def layer(self) -> int:
        """Backward through the layer with the largest intermediates; recomputed first unless they were kept."""
        kinds = [
            kind
            for kind, count in (
                ("dense", self.cfg.model.num_dense_layers),
                ("moe", self.cfg.model.num_moe_layers),
            )
            if count
        ]
        largest = max(self.attention() + self.feed_forward(kind) for kind in kinds)
        again = 0.0 if self.cfg.training.remat == "none" else 1.0
        return int(self.n * largest * (again + BACKWARD))

    def loss(self) -> int:
        """Logits of a chunk, their exponentials and their gradient; gradients of the hidden states."""
        chunk = min(self.cfg.training.loss_chunk, self.n)
        return 3 * F32 * chunk * self.d["V"] + 2 * self.c * self.n * self.d["D"]
