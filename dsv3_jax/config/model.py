"""The model's configuration and the legend of dimension letters.

Keys carry Hugging Face's names for this family, so a published `config.json` maps one to one
(`dsv3_jax.hf.config` reads and writes it).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsv3_jax.errors import ConfigError

LEGEND = {
    "B": "batch",
    "T": "query tokens",
    "S": "cached tokens",
    "D": "model width",
    "H": "heads",
    "A": "query latent",
    "C": "key-value latent",
    "N": "no-rope head dim",
    "R": "rope head dim",
    "U": "value head dim",
    "Q": "query-key head dim, N + R",
    "J": "cached values per token, C + R",
    "W": "expanded key-value head dim, N + U",
    "I": "dense feed-forward width",
    "F": "expert feed-forward width",
    "M": "shared-expert width, n_shared_experts * F",
    "P": "gate and up, 2",
    "X": "input of the multi-token projection, 2 * D",
    "Y": "index heads",
    "Z": "index head dim",
    "E": "routed experts",
    "G": "expert groups",
    "K": "experts per token",
    "L": "layers of a stack",
    "O": "rank of a LoRA pair",
    "V": "vocabulary",
}

ModelType = Literal["deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy", "dynamic"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071) with DeepSeek's mscale keys. None means "not in the file"."""

    factor: float
    """How many times the original context is extended."""
    original_max_position_embeddings: int
    """Context length of pre-training, tokens."""
    beta_fast: float = 32.0
    """Rotations above which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by `factor`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """Explicit multiplier of cos and sin; None derives it from the mscale keys."""

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"model.rope_scaling.{name} is {value!r}; expected a number above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model of the DeepSeek-V2/V3/V3.2 family. Names as in Hugging Face's config.json."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    """Width of the dense feed-forward layers."""
    moe_intermediate_size: int = 2048
    """Width of one routed expert."""
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    """Shared experts; they are one feed-forward layer n times as wide. 0 means none."""
    n_routed_experts: int = 256
    """Routed experts. 0 makes every layer dense."""
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    """Leading layers with a dense feed-forward instead of experts."""
    q_lora_rank: int | None = 1536
    """Width of the query latent; null for a direct query projection (V2-Lite, Moonlight)."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    model_type: ModelType = "deepseek_v3"
    topk_method: TopkMethod = "noaux_tc"
    """noaux_tc: V3's biased sigmoid within groups. greedy, group_limited_greedy: V2's softmax.
    dynamic: softmax top-k with renormalised weights."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    """Divide the chosen weights by their sum (noaux_tc only; V2's methods ignore it, dynamic always does)."""
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    num_nextn_predict_layers: int = 0
    """Depth of the multi-token-prediction module (V3: 1)."""
    mtp_own_embedding: bool = False
    """The multi-token module has an embedding that differs from the main one."""
    mtp_own_head: bool = False
    """The multi-token module has a head that differs from the main one."""
    index_n_heads: int = 0
    """Heads of V3.2's sparse-attention indexer; 0 means dense attention."""
    index_head_dim: int = 0
    index_topk: int = 0
    bos_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Master weights stay float32 in training; routing, norms and softmax are float32 always."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_lora_rank"
            " qk_nope_head_dim qk_rope_head_dim v_head_dim max_position_embeddings rope_theta rms_norm_eps"
            " initializer_range routed_scaling_factor"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected a number above 0")
        for name in (
            "n_shared_experts",
            "n_routed_experts",
            "first_k_dense_replace",
            "num_nextn_predict_layers",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected 0 or more")
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError(f"model.q_lora_rank is {self.q_lora_rank!r}; expected null or a number above 0")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"model.qk_rope_head_dim is {self.qk_rope_head_dim}; expected an even number")
        self._check_experts()
        self._check_indexer()
        if self.tie_word_embeddings and self.mtp_own_head:
            raise ConfigError(
                "model.mtp_own_head is true with tie_word_embeddings; a tied head has no tensor of its own"
            )
        for name in ("bos_token_id", "pad_token_id"):
            self._check_id(name, getattr(self, name))
        for value in self.eos_token_id:
            self._check_id("eos_token_id", value)

    def _check_id(self, name: str, value: int | None) -> None:
        if value is not None and not 0 <= value < self.vocab_size:
            raise ConfigError(f"model.{name} is {value}; expected 0 <= id < vocab_size = {self.vocab_size}")

    def _check_experts(self) -> None:
        if self.num_moe_layers == 0:
            if self.num_nextn_predict_layers and self.n_routed_experts == 0:
                raise ConfigError(
                    "model.num_nextn_predict_layers needs routed experts; n_routed_experts is 0"
                )
            if self.n_routed_experts == 0:
                return
        if self.moe_intermediate_size <= 0:
            raise ConfigError(
                f"model.moe_intermediate_size is {self.moe_intermediate_size}; expected a number above 0"
            )
        E, K = self.n_routed_experts, self.num_experts_per_tok
        if not 1 <= K <= E:
            raise ConfigError(f"model.num_experts_per_tok is {K}; expected 1 to n_routed_experts = {E}")
        grouped = self.topk_method in ("noaux_tc", "group_limited_greedy")
        want = "sigmoid" if self.topk_method == "noaux_tc" else "softmax"
        if self.scoring_func != want:
            raise ConfigError(
                f"model.scoring_func is {self.scoring_func!r} with topk_method {self.topk_method!r}; expected {want!r}"
            )
        if grouped:
            if self.n_group < 1 or E % self.n_group:
                raise ConfigError(
                    f"model.n_group is {self.n_group}; expected a divisor of n_routed_experts = {E}"
                )
            if not 1 <= self.topk_group <= self.n_group:
                raise ConfigError(
                    f"model.topk_group is {self.topk_group}; expected 1 to n_group = {self.n_group}"
                )
            size = E // self.n_group
            if self.topk_method == "noaux_tc" and size < 2:
                raise ConfigError(
                    f"model.n_group is {self.n_group}: groups of {size} expert; noaux_tc scores a group by two"
                )
            if self.topk_group * size < K:
                raise ConfigError(
                    f"model.topk_group is {self.topk_group}: the chosen groups hold {self.topk_group * size} experts,"
                    f" fewer than num_experts_per_tok = {K}"
                )

    def _check_indexer(self) -> None:
        sizes = (self.index_n_heads, self.index_head_dim, self.index_topk)
        if self.model_type == "deepseek_v32":
            for name, value in zip(("index_n_heads", "index_head_dim", "index_topk"), sizes, strict=True):
                if value <= 0:
                    raise ConfigError(
                        f"model.{name} is {value}; model_type deepseek_v32 expects a number above 0"
                    )
            if self.q_lora_rank is None:
                raise ConfigError(
                    "model.q_lora_rank is null; the sparse-attention indexer reads the query latent"
                )
            if self.index_head_dim < self.qk_rope_head_dim:
                raise ConfigError(
                    f"model.index_head_dim is {self.index_head_dim}; expected at least qk_rope_head_dim = "
                    f"{self.qk_rope_head_dim}"
                )
        elif any(sizes):
            raise ConfigError(
                f"model.index_* keys are {sizes} with model_type {self.model_type!r}; expected deepseek_v32"
            )

    @property
    def num_dense_layers(self) -> int:
        """Layers of the dense stack."""
        return (
            self.num_hidden_layers
            if self.n_routed_experts == 0
            else min(self.first_k_dense_replace, self.num_hidden_layers)
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers of the expert stack."""
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def has_router_bias(self) -> bool:
        """Whether routing uses the selection bias of the aux-loss-free balance rule."""
        return self.topk_method == "noaux_tc"

    @property
    def has_indexer(self) -> bool:
        """Whether attention is sparse (V3.2)."""
        return self.index_topk > 0


def dims(cfg: ModelConfig) -> dict[str, int]:
    """Size of every dimension letter that a weight of this model may carry."""
    return {
        "D": cfg.hidden_size,
        "H": cfg.num_attention_heads,
        "A": cfg.q_lora_rank or 0,
        "C": cfg.kv_lora_rank,
        "N": cfg.qk_nope_head_dim,
        "R": cfg.qk_rope_head_dim,
        "U": cfg.v_head_dim,
        "Q": cfg.qk_nope_head_dim + cfg.qk_rope_head_dim,
        "J": cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        "W": cfg.qk_nope_head_dim + cfg.v_head_dim,
        "I": cfg.intermediate_size,
        "F": cfg.moe_intermediate_size,
        "M": cfg.n_shared_experts * cfg.moe_intermediate_size,
        "P": 2,
        "X": 2 * cfg.hidden_size,
        "Y": cfg.index_n_heads,
        "Z": cfg.index_head_dim,
        "E": cfg.n_routed_experts,
        "G": cfg.n_group,
        "K": cfg.num_experts_per_tok,
        "V": cfg.vocab_size,
    }


def shape_of(cfg: ModelConfig, axes: str) -> tuple[int, ...]:
    """Shape of a weight whose name ends in `axes`, e.g. "HQA". A letter may not repeat."""
    assert len(set(axes)) == len(axes), f"axes {axes!r} repeat a letter"
    sizes = dims(cfg)
    return tuple(sizes[letter] for letter in axes)
