"""The configuration of a training run. Sections are the flags' prefixes: `--training.steps 100`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from dsv3_jax.config.kernels import parse_kernels
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.errors import ConfigError


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; expected {expected}")


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where the run lives."""

    dir: str | None = None
    """Run folder. Without it a new runs/<config>-<time> is made and printed."""
    name: str = "run"
    """Used in the name of a new run folder; the config file's name by default."""


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One source of `data.mixture`."""

    source: str
    """As `data.source`."""
    weight: float
    """Its share of the rows, over the sum of all weights."""

    def __post_init__(self) -> None:
        _require(
            bool(self.source), "data.mixture: source", self.source, "a named source, a folder or a pattern"
        )
        _require(
            0 < self.weight < float("inf"),
            f"data.mixture: weight of {self.source}",
            self.weight,
            "a number above 0",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    source: str = "python-docs"
    """A named source prepared once in the cache folder; a folder of token shards made by
    `python -m dsv3_jax.training.prepare`; or text that is tokenised as it is read: a file, folder or pattern
    ("texts/*.parquet") of .jsonl .jsonl.gz .jsonl.zst .parquet (extra `data`)."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several sources by weight, instead of `data.source`. In YAML a list of {source, weight}, as a flag
    NAME=WEIGHT,NAME=WEIGHT."""
    loader: Literal["auto", "shards", "grain"] = "auto"
    """shards reads token shards, grain text; auto takes shards where a folder has an index.json."""
    tokenizer: str = "bytes"
    """bytes, deepseek, bpe:N (N ids learned from the source; named sources only), or a folder with a tokenizer.json.
    A folder of shards has its own."""
    val_fraction: float = 0.01
    """Share of documents held out for evaluation (named sources and text)."""
    verify: Literal["cached", "full", "never"] = "cached"
    """Checksums of token shards: of files that changed since they were last read whole, of all, or of none."""
    text_key: str = "text"
    """Key or column of the text in jsonl and parquet."""
    workers: int = 2
    """Processes that tokenise text as it is read; 0 uses a thread of this one."""

    def __post_init__(self) -> None:
        _require(0 <= self.val_fraction < 1, "data.val_fraction", self.val_fraction, "0 <= fraction < 1")
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        names = [part.source for part in self.mixture]
        for name in names:
            _require(names.count(name) == 1, "data.mixture", names, "every source once")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Steps, batch and losses."""

    steps: int = 1000
    """Total steps of the run, counted from 1."""
    batch_size: int = 8
    """Global batch, sequences a step."""
    seq_len: int = 512
    """Tokens a sequence."""
    accumulate: int = 1
    """Micro-batches a step; batch_size is divided by it."""
    batch_ramp_start: int = 0
    """Global batch of the first step, from which it grows to batch_size; 0: batch_size from the start (V3: 3072)."""
    batch_ramp_steps: int = 0
    """Steps until the batch is batch_size (V3: over the first 469B tokens)."""
    batch_ramp_sizes: int = 5
    """Sizes of the ramp, evenly spaced, first and last included; the step is compiled once for each."""
    mtp_loss_weight: float = 0.3
    """Weight of the multi-token-prediction loss (V3 report: 0.3, later 0.1)."""
    mtp_late_weight: float | None = None
    """Its weight after mtp_late_fraction of the run's samples (V3: 0.1); null keeps mtp_loss_weight."""
    mtp_late_fraction: float = 10.0 / 14.8
    """Share of the run before mtp_late_weight holds (V3: 10T of 14.8T tokens)."""
    balance_update_rate: float = 1e-3
    """u of the aux-loss-free balance rule (arXiv 2408.15664); 0 freezes the bias."""
    balance_stop_fraction: float = 1.0
    """Share of the run's samples after which that rate is 0 (V3: 14.3T of 14.8T tokens, 0.9662)."""
    balance_loss_alpha: float = 1e-4
    """Weight of the sequence-wise balance loss (V3 report, eq. 17-20)."""
    loss_chunk: int = 1024
    """Tokens whose logits are held at once."""
    remat: Literal["none", "latents", "full"] = "latents"
    """Recomputation in backward: none keeps all, latents keeps latents and attention output, full layer inputs."""
    products: Literal["compute", "fp8"] = "compute"
    """What the products of attention, dense layers, shared and routed experts round their operands to: model.dtype, or
    e4m3 with scales for 128 numbers (weights 128 x 128), forward and backward, as V3 was trained (report 3.3)."""
    eval_every: int = 0
    """Steps between evaluations on held-out data; 0 evaluates at the end only."""
    eval_batches: int = 8
    watchdog_minutes: float = 30.0
    """Minutes without a finished step after which the process prints its stacks and ends with exit code 75; 0 never."""
    spike_guard: float = 0.0
    """A step whose loss or gradient norm is more than this many median absolute deviations above the median of the
    last 64 applied steps is not applied; 0 applies every finite step. 10 to 20 stops only what stands far out."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "loss_chunk", "eval_batches"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "1 or more")
        for name in (
            "mtp_loss_weight",
            "balance_update_rate",
            "balance_loss_alpha",
            "eval_every",
            "watchdog_minutes",
            "spike_guard",
        ):
            _require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        _require(
            self.batch_size % self.accumulate == 0,
            "training.accumulate",
            self.accumulate,
            f"a divisor of training.batch_size = {self.batch_size}",
        )
        for name in ("mtp_late_fraction", "balance_stop_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"training.{name}", getattr(self, name), "0 to 1")
        late = self.mtp_late_weight
        _require(late is None or late >= 0, "training.mtp_late_weight", late, "null or 0 or more")
        if self.batch_ramp_start:
            self._check_ramp()

    def _check_ramp(self) -> None:
        first, last, steps, sizes = (
            self.batch_ramp_start,
            self.batch_size,
            self.batch_ramp_steps,
            self.batch_ramp_sizes,
        )
        _require(2 <= sizes <= 16, "training.batch_ramp_sizes", sizes, "2 to 16")
        _require(
            steps >= sizes - 1, "training.batch_ramp_steps", steps, f"{sizes - 1} or more, a step a size"
        )
        grain = (sizes - 1) * self.accumulate
        _require(
            0 < first < last and (last - first) % grain == 0 and first % self.accumulate == 0,
            "training.batch_ramp_start",
            first,
            f"a multiple of training.accumulate = {self.accumulate} below training.batch_size = {last}, from which "
            f"{sizes - 1} equal steps of such multiples lead to it",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers by orthogonalised momentum (arXiv 2502.16982); embedding, head, router, norms
    and biases by AdamW, with the same learning rate and decay."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "v3", "constant"] = "cosine"
    """cosine: warm-up, then cosine to lr * min_lr_ratio at the last step. wsd: warm-up, constant, 1 - sqrt decay to
    lr * min_lr_ratio over decay_fraction. v3: warm-up, constant, cosine decay, then two constant levels in the
    proportions of the V3 report (section 4.2). constant: warm-up only."""
    decay_fraction: float = 0.2
    """Last share of the run's samples in which wsd decays."""
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; norms and biases are not decayed."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 never clips."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the moments are kept in between steps (the V3 report keeps AdamW's in bfloat16)."""
    muon_momentum: float = 0.95
    muon_steps: int = 5
    """Newton-Schulz iterations."""
    muon_dtype: Literal["float32", "bfloat16"] = "float32"
    """What Newton-Schulz computes in; it was published with bfloat16, which GPUs multiply faster."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "a number above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")
        for name in ("b1", "b2", "min_lr_ratio", "muon_momentum"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "0 to 1")
        _require(self.eps > 0, "optimizer.eps", self.eps, "a number above 0")
        _require(
            0 < self.decay_fraction <= 1,
            "optimizer.decay_fraction",
            self.decay_fraction,
            "above 0 and at most 1",
        )
        _require(self.muon_steps >= 1, "optimizer.muon_steps", self.muon_steps, "1 or more")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how many steps to keep."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_best: int = 0
    """Checkpoints kept besides for the lowest held-out loss (checkpoints/best.json names them); above 0 every
    checkpoint but that of a stop is evaluated."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; it needs memory on the host for a copy of the state."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "1 or more")
        for name in ("keep", "keep_best"):
            _require(getattr(self, name) >= 0, f"checkpoint.{name}", getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """What is printed and written beside metrics.jsonl."""

    every: int = 10
    """Steps between printed lines; metrics.jsonl has every step."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tb`)."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "logging.every", self.every, "1 or more")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from."""

    checkpoint: str | None = None
    """Native checkpoint, run folder or Hugging Face folder: weights and tokenizer, fresh optimiser."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Training of low-rank pairs beside frozen weights (docs/finetuning.md); off while rank is 0."""

    rank: int = 0
    """Rank of every pair; 0 trains the weights themselves."""
    alpha: float = 16.0
    """The pairs' product counts alpha / rank times."""
    rslora: bool = False
    """alpha / sqrt(rank) instead."""
    targets: tuple[str, ...] = ("attention",)
    """What gets a pair: attention, dense, shared, experts, all-linear; modules such as q_b_proj or down_proj; or
    patterns of leaves such as params/moe/attention/*."""
    base: str | None = None
    """The frozen weights: native checkpoint, run folder or Hugging Face folder, in the type that they are stored in.
    The model is the base's; keys of `model` may add to it (dtype)."""
    base_quantize: str = "none"
    """Round attention and feed-forward weights of the base while loading: int8, int4:64, fp8, ...; none keeps them."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "0 (off) or more")
        _require(0 < self.alpha < float("inf"), "lora.alpha", self.alpha, "a number above 0")
        _require(bool(self.targets), "lora.targets", self.targets, "at least one")
        _require(
            bool(self.rank) == (self.base is not None),
            "lora.base",
            self.base,
            "a checkpoint, where lora.rank is above 0" if self.rank else "none where lora.rank is 0",
        )
        _require(
            bool(self.rank) or self.base_quantize == "none",
            "lora.base_quantize",
            self.base_quantize,
            "none where lora.rank is 0",
        )


MESH_PRESETS: dict[str, dict[str, int]] = {
    "one_gpu": {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1},
    # Experts over the fast links of one machine; dense weights are cut over the same devices.
    "8gpu": {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1},
    "64gpu": {"data": 1, "fsdp": 8, "expert": 8, "tensor": 1},
    # 64-way expert parallelism over 8 machines, as in the V3 report (section 3.2).
    "2048gpu": {"data": 8, "fsdp": 4, "expert": 64, "tensor": 1},
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices an axis; fsdp 0 takes the rest."""

    data: int = 1
    """Copies of the dense weights; tokens are cut over data, fsdp and expert."""
    fsdp: int = 0
    """Dense weights are cut over this axis and `expert`, and gathered where a layer uses them."""
    expert: int = 1
    """Routed experts are cut over this axis; their tokens travel."""
    tensor: int = 1
    """Heads and widths are cut over this axis."""
    preset: Literal["none", "one_gpu", "8gpu", "64gpu", "2048gpu"] = "none"
    """Axes for a number of GPUs, instead of the four above."""

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor"):
            _require(getattr(self, name) >= 1, f"mesh.{name}", getattr(self, name), "1 or more")
        _require(self.fsdp >= 0, "mesh.fsdp", self.fsdp, "0 (take the rest) or more")
        _require(self.preset in ("none", *MESH_PRESETS), "mesh.preset", self.preset, ", ".join(MESH_PRESETS))
        axes = (self.data, self.fsdp, self.expert, self.tensor)
        _require(
            self.preset == "none" or axes == (1, 0, 1, 1),
            "mesh.preset",
            self.preset,
            f"none beside axes of your own (data, fsdp, expert, tensor = {axes})",
        )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """How tokens reach experts on other devices; the result of a step is the same, unless pairs are dropped."""

    dispatch: Literal["auto", "gather", "all_to_all", "ragged_all_to_all"] = "auto"
    """gather: all tokens to every device of the expert axis. all_to_all: each token to the devices that hold its
    experts. ragged_all_to_all: the same without padding, GPUs only. auto: by shape, logged."""
    chunk: int = 4096
    """Tokens a device sends at a time, which bounds the buffers; 0: all at once."""
    capacity_factor: float = 0.0
    """0: no token is ever dropped. Above 0: a fixed capacity of all_to_all in multiples of the mean; what exceeds it is
    dropped and counted."""

    def __post_init__(self) -> None:
        _require(self.chunk >= 0, "moe.chunk", self.chunk, "0 (all at once) or more")
        _require(
            self.capacity_factor >= 0, "moe.capacity_factor", self.capacity_factor, "0 (never drop) or more"
        )
        _require(
            not self.capacity_factor or self.dispatch == "all_to_all",
            "moe.capacity_factor",
            self.capacity_factor,
            f"0 with moe.dispatch = {self.dispatch} (only all_to_all drops)",
        )


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on many hosts. Where a run happens is no part of what it is: a restart may differ."""

    cluster: Literal["auto", "none", "flags", "mpi", "slurm", "kubernetes"] = "auto"
    """Where the three values below come from when they are not given: auto looks for all, none runs one process."""
    coordinator_address: str | None = None
    """host:port on which process 0 listens; every process must be able to reach it."""
    num_processes: int | None = None
    """Processes in all."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_timeout_seconds: int = 10
    """Silence after which a process counts as dead and all others end."""
    initialization_timeout_seconds: int = 300
    """How long a process waits at the start until all have come."""

    def __post_init__(self) -> None:
        for name in ("heartbeat_timeout_seconds", "initialization_timeout_seconds"):
            _require(getattr(self, name) >= 1, f"distributed.{name}", getattr(self, name), "1 or more")
        host, _, port = (self.coordinator_address or "host:1").rpartition(":")
        _require(
            bool(host) and port.isdecimal() and 0 < int(port) < 65536,
            "distributed.coordinator_address",
            self.coordinator_address,
            "host:port, such as node1:5557",
        )
        count = self.num_processes
        _require(count is None or count >= 1, "distributed.num_processes", count, "1 or more")
        _require(
            self.process_id is None or 0 <= self.process_id < (count or self.process_id + 1),
            "distributed.process_id",
            self.process_id,
            "0 or more" if count is None else f"0 to {count - 1}, as distributed.num_processes is {count}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a training run needs; saved resolved as config.yaml in the run folder."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    run: RunSection = dataclasses.field(default_factory=RunSection)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    kernels: str = "auto"
    """Implementation of attention and of the experts' products: auto, reference (XLA) or mosaic (hand-written, Hopper
    GPUs), with exceptions such as mosaic,attention=reference. auto takes a hand-written kernel only where a committed
    run on this kind of device shows it correct."""
    seed: int = 0

    def __post_init__(self) -> None:
        parse_kernels(self.kernels)
        _require(
            self.training.products == "compute" or self.mesh.tensor == 1,
            "mesh.tensor",
            self.mesh.tensor,
            "1 with training.products = fp8 (a block of 128 must lie on one device)",
        )
        _require(0 <= self.seed < 2**31, "seed", self.seed, "0 <= seed < 2**31")
        if self.lora.rank:
            checkpoint, name = self.init.checkpoint, self.optimizer.name
            _require(checkpoint is None, "init.checkpoint", checkpoint, "none beside lora.base")
            _require(name == "adamw", "optimizer.name", name, "adamw where lora.rank is above 0")
            products = self.training.products
            _require(
                products == "compute", "training.products", products, "compute where lora.rank is above 0"
            )
        _require(
            self.training.seq_len <= self.model.max_position_embeddings,
            "training.seq_len",
            self.training.seq_len,
            f"at most model.max_position_embeddings = {self.model.max_position_embeddings}",
        )
