"""Bytes that grow with the tokens of a micro-batch, from the config's dimension letters."""

from __future__ import annotations

from typing import Any

from dsv3_jax.config import RunConfig, dims
from dsv3_jax.errors import ConfigError
from dsv3_jax.parallel.dispatch import make_dispatch
from dsv3_jax.parallel.exchange import EXPERT_HEADROOM, PEER_HEADROOM
from dsv3_jax.training.step import shards_of

F32 = 4
# Backward through a layer holds gradients of what it reads beside it. As multiples of the layer's own intermediates,
# and of the padded rows of an expert exchange; measured in float32 on XLA:CPU (docs/planning.md).
BACKWARD, BACKWARD_EXCHANGED = 1.2, 0.6


class Tokens:
    """Bytes that grow with the tokens of a micro-batch on one device.

    Raises ConfigError for a batch that cannot be cut into devices times micro-batches.
    """

    def __init__(self, cfg: RunConfig, mesh: Any) -> None:
        training = cfg.training
        parts = shards_of(mesh)
        if training.batch_size % (parts * training.accumulate):
            raise ConfigError(
                f"training.batch_size is {training.batch_size}; expected a multiple of {parts} devices x "
                f"training.accumulate = {training.accumulate}"
            )
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
        return size + 6 * self.c * d["M"]

    def experts(self) -> int:
        """Rows to the experts, gate, up, activation, product, and the rows that come back, for tokens of one visit."""
        d, c, e = self.d, self.c, self.expert
        K, D, F = d["K"], d["D"], d["F"]
        if e == 1:
            return K * (c * D + 6 * c * F + F32 * D)
        here = EXPERT_HEADROOM * K * (2 * c * D + 6 * c * F)
        return int(here + self._exchanged() * 2 * c * D)

    def _exchanged(self) -> float:
        """Rows a device holds of others' tokens, for each of its own."""
        moe = self.cfg.moe
        how = make_dispatch(self.cfg.model, self.expert, backend=moe.dispatch, platform="cuda")
        if how is None:
            return 0.0
        peers = min(how.fan_out, self.d["K"], self.expert)
        return self.expert if how.backend == "gather" else (moe.capacity_factor or PEER_HEADROOM) * peers

    @property
    def visit(self) -> int:
        """Tokens that are sent to experts at a time; all of them where no token travels."""
        chunk = self.cfg.moe.chunk
        return self.n if self.expert == 1 or not chunk else min(self.n, chunk)

    # --- bytes ----------------------------------------------------------------------------------------------------

    def kept(self) -> int:
        """What all layers keep until their backward."""
        d, c, model = self.d, self.c, self.cfg.model
        policy = self.cfg.training.remat
        if policy == "none":
            dense, moe = (self.attention() + self.feed_forward(kind) for kind in ("dense", "moe"))
            # Several visits are recomputed one by one; only what goes into and comes out of them is kept.
            moe += self.experts() if self.visit == self.n else 2 * c * d["D"]
        else:
            dense = c * d["D"]
            if policy == "latents":
                # The trace stacks attention_out twice, by its name and for its own gradient; XLA merges the two.
                dense += c * (d["A"] + d["C"] + d["R"] + d["H"] * d["U"]) + F32 * d["H"]
            moe = dense
        size = model.num_dense_layers * dense + model.num_moe_layers * moe
        depth = model.num_nextn_predict_layers
        # The multi-token module's three norms and its projection are outside of the rematerialised block.
        size += depth * (moe + 3 * self._norm(d["D"]) + 2 * c * d["D"])
        return self.n * (size + self._norm(d["D"]))

    def layer(self) -> int:
        """Backward through the layer with the largest intermediates; recomputed first unless they were kept."""
        model = self.cfg.model
        dense = self.n * (self.attention() + self.feed_forward("dense")) if model.num_dense_layers else 0
        moe = experts = 0
        if model.num_moe_layers:
            moe = self.n * (self.attention() + self.feed_forward("moe"))
            experts = self.visit * self.experts()
        recomputed = 0.0 if self.cfg.training.remat == "none" else 1.0
        expert_backward = BACKWARD if self.expert == 1 else BACKWARD_EXCHANGED
        # Several visits are always recomputed one by one.
        expert_recomputed = 1.0 if self.visit < self.n else recomputed
        return int(
            max(
                dense * (recomputed + BACKWARD),
                moe * (recomputed + BACKWARD) + experts * (expert_recomputed + expert_backward),
            )
        )

    def loss(self) -> int:
        """Logits of a chunk, their exponentials and their gradient; gradients of the hidden states."""
        chunk = min(self.cfg.training.loss_chunk, self.n)
        return 3 * F32 * chunk * self.d["V"] + 2 * self.c * self.n * self.d["D"]
