"""PEFT's files: adapter_config.json and adapter_model.safetensors, read and written without torch or peft.

    base_model.model.<module>.lora_A.weight    [rank, in]
    base_model.model.<module>.lora_B.weight    [out, rank]

with the names of Hugging Face's modules. transformers (from 5) keeps routed experts as 3-D parameters, gate and up in
one, which PEFT adapts by `target_parameters`: for E experts lora_A is [E rank, in], expert by expert, and lora_B
[out, rank E], experts running fastest. Of the two parameters gate_up_proj is nested one
`base_layer` deeper. Adapters with a module for each expert (earlier transformers) are read too.

peft 0.21 with transformers 5 takes target modules named gate_proj, up_proj or down_proj of this model for the experts',
and so cannot open pairs of dense and shared layers; these have the plain names of their modules here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.finetune.lora import Lora
from dsv3_jax.finetune.targets import adaptable, letters_of
from dsv3_jax.hf.rules import HFEntry, flatten_paths, hf_entries, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPES, parse_json, read_array, read_header
from dsv3_jax.hf.tensors import cast

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_CHANGES = (
    "use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "alora_invocation_tokens", "trainable_token_indices",
)  # fmt: skip
"""Options that, set to anything, give a pair another meaning than W + scale * b a."""

Factors = tuple[np.ndarray, np.ndarray]


def _module(entry: HFEntry) -> str:
    return entry.name.removesuffix(".weight")


def factors_of(lora: Lora, flat: Mapping[str, np.ndarray], entry: HFEntry) -> Factors:
    """(A [rank, in], B [out, rank]) of one Hugging Face matrix."""
    letters = letters_of(entry.path)
    a = np.asarray(flat[f"{entry.path}/a_{letters.a}"])[entry.index]
    b = np.asarray(flat[f"{entry.path}/b_{letters.b}"])[entry.index]
    return a.reshape(lora.rank, -1), b.reshape(-1, lora.rank)


# --- writing --------------------------------------------------------------------------------------------------


def tensors_of(
    lora: Lora, pairs: Mapping[str, Any], cfg: ModelConfig, abstract: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors by name, and the keys of adapter_config.json that depend on them.

    The experts' gate and up become one parameter of twice the rank, whose B is twice as large: their product then
    counts as before. The multi-token module has no place in transformers: leave its pairs out before.
    """
    flat = flatten_paths(pairs)
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, dict[str, list[Factors]]] = {}
    modules: dict[str, list[str]] = {}
    for entry in hf_entries(cfg, abstract):
        if entry.path not in lora.paths:
            continue
        one, module = factors_of(lora, flat, entry), _module(entry)
        if "/experts/" in entry.path:
            owner, _, name = module.rpartition(".")
            owner = owner.rpartition(".")[0]  # without the expert's number
            experts.setdefault(owner, {}).setdefault(name, []).append(one)
            continue
        modules.setdefault(module.rpartition(".")[2], []).append(module)
        _put(tensors, module, one)
    parameters: set[str] = set()
    ranks: dict[str, int] = {}
    for owner, by_name in experts.items():
        gate_up = "gate_proj" in by_name
        if gate_up:
            parameters.add(_GATE_UP)
            ranks[_GATE_UP] = 2 * lora.rank
            both = [
                _side_by_side(gate, up, lora)
                for gate, up in zip(by_name["gate_proj"], by_name["up_proj"], strict=True)
            ]
            _put(tensors, f"{owner}.base_layer" if "down_proj" in by_name else owner, _stacked(both))
        if "down_proj" in by_name:
            parameters.add(_DOWN)
            _put(tensors, owner, _stacked(by_name["down_proj"]))
    every: dict[str, int] = {}
    for entry in hf_entries(cfg, abstract):
        if "/experts/" not in entry.path and not entry.path.startswith("params/mtp/"):
            name = _module(entry).rpartition(".")[2]
            every[name] = every.get(name, 0) + 1
    # A short name stands for every module that ends in it.
    targets = sorted(
        target
        for name, found in modules.items()
        for target in ([name] if len(found) == every[name] else found)
    )
    config = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": {}}
    return tensors, config | ({"target_parameters": sorted(parameters)} if parameters else {})


def _put(tensors: dict[str, np.ndarray], module: str, one: Factors) -> None:
    tensors[f"{_PREFIX}{module}.lora_A.weight"], tensors[f"{_PREFIX}{module}.lora_B.weight"] = one


def _side_by_side(gate: Factors, up: Factors, lora: Lora) -> Factors:
    """One pair of twice the rank for gate above up; twice the rank halves (rsLoRA: by sqrt 2) what b a counts."""
    factor = np.float32(math.sqrt(2) if lora.rslora else 2)
    (F, r), zero = gate[1].shape, np.zeros_like(gate[1])
    b = np.block([[gate[1], zero], [zero, up[1]]]) * factor
    assert b.shape == (2 * F, 2 * r)
    return np.concatenate([gate[0], up[0]]), b


def _stacked(experts: list[Factors]) -> Factors:
    a = np.concatenate([a for a, _ in experts])
    b = np.stack([b for _, b in experts], axis=-1)  # out, rank, E
    return a, b.reshape(b.shape[0], -1)


def config_of(lora: Lora, keys: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        **keys,
    }


# --- reading --------------------------------------------------------------------------------------------------


def read(
    folder: Path, cfg: ModelConfig, abstract: Mapping[str, Any]
) -> tuple[Lora, dict[str, Any], dict[str, Any], list[str]]:
    """(what the pairs are, the pairs, their base, notes) of a PEFT folder.

    All pairs get the largest rank: what is missing of one is zeros, which changes nothing; another scale goes into b.

    Raises:
      ConfigError: another method than LoRA, or an option that has no meaning here; a module that the model has not.
      DataError: files that cannot be read, or a factor without the other.
    """
    config = parse_json((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG}: a JSON object expected")
    _check_config(config, folder)
    found = _modules(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    rslora = bool(config.get("use_rslora"))
    factors, left = _by_matrix(found, cfg, abstract, config, folder)
    if left:
        raise ConfigError(
            f"{folder}: pairs for {len(left)} modules that the model has not, such as {left[0]}"
        )
    if not factors:
        raise DataError(f"{folder / WEIGHTS}: no pair is in it")
    most = max([rank, *(a.shape[0] for a, _, _ in factors.values())])
    paths = {entry.path for entry in factors}
    lora = Lora(most, float(alpha), rslora, tuple(path for path in flatten_paths(abstract) if path in paths))
    notes, flat = [], {}
    entries = [entry for entry in hf_entries(cfg, abstract) if entry.path in paths]
    shapes = {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}
    for entry in entries:
        letters = letters_of(entry.path)
        name_a, name_b = f"{entry.path}/a_{letters.a}", f"{entry.path}/b_{letters.b}"
        front, end = shapes[entry.path][: len(entry.index)], len(entry.block_shape) - letters.inputs
        if name_a not in flat:
            flat[name_a] = np.zeros((*front, most, *entry.block_shape[end:]), np.float32)
            flat[name_b] = np.zeros((*front, *entry.block_shape[:end], most), np.float32)
        if entry not in factors:
            continue
        a, b, scale = factors[entry]
        if a.shape[1] != entry.hf_shape[1] or b.shape[0] != entry.hf_shape[0]:
            raise ConfigError(
                f"{folder}: the pair of {_module(entry)} is [{b.shape[0]}, {a.shape[1]}]; the model's weight is "
                f"{list(entry.hf_shape)}"
            )
        r = a.shape[0]
        flat[name_a][entry.index][:r] = a.reshape(r, *entry.block_shape[end:])
        flat[name_b][entry.index][..., :r] = (b * np.float32(scale / lora.scale)).reshape(
            *entry.block_shape[:end], r
        )
    missing = len(entries) - len(factors)
    if missing:
        notes.append(f"{missing} weights of the adapted leaves have no pair in {folder}: theirs are zeros")
    return lora, unflatten_paths(flat), {"path": config.get("base_model_name_or_path")}, notes


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    alphas = config.get("alpha_pattern") or {}
    init = config.get("init_lora_weights")
    wrong = {
        "peft_type": config.get("peft_type") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "r": type(config.get("r")) is not int,
        "lora_alpha": not _is_alpha(config.get("lora_alpha")),
        "alpha_pattern": not isinstance(alphas, dict) or not all(map(_is_alpha, alphas.values())),
        # These change the frozen weights too, when PEFT opens the adapter.
        "init_lora_weights": isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq")),
        **{key: bool(config.get(key)) for key in _CHANGES},
    }
    for key, bad in wrong.items():
        if bad:
            raise ConfigError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, which is not supported")


def _is_alpha(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _modules(folder: Path) -> dict[str, Factors]:
    """A and B in float32 by module."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise DataError(f"{folder}: {CONFIG} without {WEIGHTS}")
    infos, _ = read_header(file)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, info in infos.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise ConfigError(f"{file}: {name} is not a LoRA factor of a weight")
        value = cast(read_array(info.file, info.offset, DTYPES[info.dtype], info.shape), "F32")
        halves.setdefault(match[1], {})[match[2]] = value
    single = [module for module, half in halves.items() if len(half) != 2]
    if single:
        raise DataError(f"{file}: {single[0]} has one factor of two")
    for module, half in halves.items():
        a, b = half["A"].shape, half["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise DataError(
                f"{file}: the factors of {module} are {list(a)} and {list(b)}; [rank, in] and [out, rank]"
            )
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _by_matrix(
    found: Mapping[str, Factors],
    cfg: ModelConfig,
    abstract: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
) -> tuple[dict[HFEntry, tuple[np.ndarray, np.ndarray, float]], list[str]]:
    """(A, B, scale) of every Hugging Face matrix that has a pair, and modules that are none of the model's."""
    able = set(adaptable(flatten_paths(abstract)))
    entries = {_module(entry): entry for entry in hf_entries(cfg, abstract) if entry.path in able}
    factors: dict[HFEntry, tuple[np.ndarray, np.ndarray, float]] = {}
    left = []
    for module, (a, b) in found.items():
        if module in entries:
            factors[entries[module]] = (a, b, _scale(config, module, a.shape[0]))
            continue
        owner = module.removesuffix(".base_layer")
        if not owner.endswith("mlp.experts") or f"{owner}.0.down_proj" not in entries:
            left.append(module)
            continue
        E = cfg.n_routed_experts
        r, rest = divmod(a.shape[0], E)
        if rest:
            raise ConfigError(f"{folder}: {module}: {a.shape[0]} rows of A are not those of {E} experts")
        a_ErK, b_RrE = a.reshape(E, r, -1), b.reshape(b.shape[0], r, E)
        down = entries[f"{owner}.0.down_proj"].hf_shape
        # Which parameter it is: down's columns are the experts' width, whatever is nested in what.
        is_down = a.shape[1] == down[1] and b.shape[0] == down[0]
        name = _DOWN if is_down else _GATE_UP
        scale = _scale(config, f"{owner.removesuffix('mlp.experts')}{name}", r)
        for e in range(E):
            if is_down:
                factors[entries[f"{owner}.{e}.down_proj"]] = (a_ErK[e], b_RrE[:, :, e], scale)
                continue
            F = b.shape[0] // 2
            for half, word in enumerate(("gate_proj", "up_proj")):
                part = b_RrE[half * F : (half + 1) * F, :, e]
                factors[entries[f"{owner}.{e}.{word}"]] = (a_ErK[e], part, scale)
    return factors, left


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            found = re.fullmatch(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise DataError(f"{CONFIG}: alpha_pattern {pattern!r}: {error}") from None
        if found:
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
