"""What a Hugging Face folder holds against what its config asks for, decided from headers and index alone.

`plan_folder` either accounts for every tensor of the folder exactly once, as an entry of the model, the scale of
one, an alias of one, or a buffer known to be redundant, or raises one report of everything that does not fit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import DataError
from dsv3_jax.hf import fp8
from dsv3_jax.hf.rules import HFEntry, flatten_paths, hf_entries, unflatten_paths
from dsv3_jax.hf.safetensors import SafetensorsFolder, TensorInfo
from dsv3_jax.hf.tensors import FLOATS, FP8, SCALES, StoredTensor, same_bytes, widest
from dsv3_jax.quantization.formats import fp8_format

AbstractFn = Callable[[ModelConfig], Mapping[str, Any]]

EMBED, HEAD = "params/embed_VD", "params/head_VD"
MTP_EMBED, MTP_HEAD = "params/mtp/embed_VD", "params/mtp/head_VD"
_SHOWN = 20  # names shown of each kind of problem; the count is always the whole

# Saved by old versions of transformers; a function of the config.
_REDUNDANT_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")


@dataclasses.dataclass(frozen=True)
class HFPlan:
    """An accepted folder.

    Attributes:
      cfg: the config with the multi-token module as it really is in the folder.
      abstract: the matching tree of shapes.
      entries: every HF tensor that is a slice of a leaf, in leaf order.
      tensors: where those tensors lie, by HF name.
      aliases: HF names that are byte-equal copies of another name and have no leaf of their own.
      notes: what a user should be told, one line each.
      ignored: names that are read by nobody.
    """

    cfg: ModelConfig
    abstract: dict[str, Any]
    entries: list[HFEntry]
    tensors: dict[str, StoredTensor]
    aliases: dict[str, str]
    notes: list[str]
    ignored: tuple[str, ...] = ()


def is_router(path: str) -> bool:
    """Whether a leaf is a router bias: float32 in memory always, untouched by casts."""
    return path.startswith("router/")


def in_mtp(path: str) -> bool:
    """Whether a leaf belongs to the multi-token-prediction module."""
    return path.split("/")[1] == "mtp"


def plan_folder(
    folder: SafetensorsFolder, cfg: ModelConfig, hf_config: Mapping[str, Any], abstract: AbstractFn
) -> HFPlan:
    """Match a folder with its config.

    Args:
      cfg, hf_config: the folder's config.json, typed and as it came.
      abstract: `dsv3_jax.model.abstract_variables`.
    Raises:
      DataError: one report of all missing, extra, duplicate and misshaped tensors, unpaired scales, unsupported
        dtypes, and multi-token tensors that are there only in part.
    """
    mtp = cfg.num_nextn_predict_layers > 0
    # The largest set of names the config allows: own copies of embedding and head, and a head although tied.
    known_cfg = dataclasses.replace(cfg, tie_word_embeddings=False, mtp_own_embedding=mtp, mtp_own_head=mtp)
    known_tree = abstract(known_cfg)
    known = {entry.name: entry for entry in hf_entries(known_cfg, known_tree)}
    present = set(folder.tensors)
    notes: list[str] = []
    dropped: set[str] = {HEAD} if cfg.tie_word_embeddings else set()

    mtp_names = {name for name, entry in known.items() if in_mtp(entry.path)}
    optional = {name for name, entry in known.items() if entry.path in dropped | {MTP_EMBED, MTP_HEAD}}
    if mtp and not mtp_names & present:
        notes.append(
            f"config.json announces {cfg.num_nextn_predict_layers} multi-token-prediction layer(s) but the folder "
            "holds none of their tensors: loaded without"
        )
        known = {name: entry for name, entry in known.items() if name not in mtp_names}
        optional -= mtp_names
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
        dropped.add("params/mtp")
        dropped.add("router/mtp")
    elif mtp:
        # Copies of embedding and head come together (as released) or not at all; of a tied head there is none.
        copies = {
            n for n in mtp_names & optional if not (cfg.tie_word_embeddings and known[n].path == MTP_HEAD)
        }
        if copies & present:
            optional -= copies

    problems = list(folder.problems)
    tensors, scales = _match_scales(folder, hf_config, problems)
    ignored = tuple(sorted(name for name in present - set(known) if _REDUNDANT_BUFFER.search(name)))
    missing = [known[name] for name in known if name not in present and name not in optional]
    _report(problems, "missing", [f"{entry.name} (shape {list(entry.hf_shape)})" for entry in missing])
    partial = len([entry for entry in missing if in_mtp(entry.path)])
    if mtp and partial and known.keys() & mtp_names:
        problems.append(
            f"of the multi-token-prediction tensors that config.json announces {partial} are missing: "
            "all or none expected"
        )
    extra = sorted(present - set(known) - scales - set(ignored))
    _report(problems, "extra", [f"{name} (shape {list(folder.tensors[name].shape)})" for name in extra])
    _check_tensors(known, tensors, problems)
    if problems:
        raise DataError("\n  ".join([f"{folder.folder}: does not fit its config.json", *problems]))
    if ignored:
        notes.append(f"ignored {len(ignored)} rotary inv_freq buffer(s): they follow from the config")

    aliases, own = _copies(folder, cfg, known, tensors)
    cfg = dataclasses.replace(cfg, mtp_own_embedding=MTP_EMBED in own, mtp_own_head=MTP_HEAD in own)
    dropped |= {MTP_EMBED, MTP_HEAD} - own
    entries = [entry for entry in known.values() if not _under(entry.path, dropped)]
    tree = {path: leaf for path, leaf in flatten_paths(known_tree).items() if not _under(path, dropped)}
    used = {entry.name for entry in entries}
    assert used | set(aliases) | scales | set(ignored) == present, "a tensor is used by nobody"
    return HFPlan(
        cfg=cfg,
        abstract={"params": {}, "router": {}, **unflatten_paths(tree)},
        entries=entries,
        tensors={name: tensors[name] for name in used},
        aliases=aliases,
        notes=notes,
        ignored=ignored,
    )


def _under(path: str, prefixes: Iterable[str]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def _report(problems: list[str], kind: str, items: list[str]) -> None:
    problems.extend(f"{kind}: {item}" for item in items[:_SHOWN])
    if len(items) > _SHOWN:
        problems.append(f"{kind}: ... and {len(items) - _SHOWN} more ({len(items)} in all)")


def _match_scales(
    folder: SafetensorsFolder, hf_config: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, StoredTensor], set[str]]:
    """Pairs FP8 weights with their scales, which may lie in another file. Returns tensors and the scales' names."""
    block = fp8.block_size(dict(hf_config))
    infos = folder.tensors
    scales = {name for name in infos if name.endswith(fp8.SCALE_SUFFIX)}
    tensors: dict[str, StoredTensor] = {}
    unpaired: list[str] = []
    for name in sorted(scales):
        weight = infos.get(name.removesuffix(fp8.SCALE_SUFFIX))
        if weight is None:
            unpaired.append(f"{name}: no weight {name.removesuffix(fp8.SCALE_SUFFIX)}")
        elif weight.dtype != FP8:
            unpaired.append(f"{name}: its weight is {weight.dtype}, not {FP8}")
    for name, info in infos.items():
        scale: TensorInfo | None = None
        if info.dtype == FP8:
            scale = infos.get(name + fp8.SCALE_SUFFIX)
            if block is None:
                unpaired.append(f"{name}: {FP8}, but config.json has no quantization_config")
            elif scale is None:
                unpaired.append(f"{name}: {FP8} without its scale {name + fp8.SCALE_SUFFIX}")
            elif len(info.shape) != 2 or scale.shape != fp8.scale_shape(info.shape, block):
                want = list(fp8.scale_shape(info.shape, block)) if len(info.shape) == 2 else "two dimensions"
                unpaired.append(
                    f"{scale.name}: shape {list(scale.shape)} for a weight {list(info.shape)} in blocks of "
                    f"{list(block)}; {want} expected"
                )
            elif scale.dtype not in SCALES:
                unpaired.append(f"{scale.name}: dtype {scale.dtype}; one of {', '.join(SCALES)} expected")
        fmt = str(fp8_format(block)) if scale and block else ""
        tensors[name] = StoredTensor(name, info.dtype, info.shape, info.file, info.offset, scale, fmt)
    _report(problems, "scale", unpaired)
    return tensors, scales


def _check_tensors(
    known: Mapping[str, HFEntry], tensors: Mapping[str, StoredTensor], problems: list[str]
) -> None:
    shapes, dtypes = [], []
    for name, entry in known.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tensor.shape != entry.hf_shape:
            shapes.append(f"{name}: shape {list(tensor.shape)}, {list(entry.hf_shape)} expected")
        if tensor.dtype not in (*FLOATS, FP8):
            dtypes.append(f"{name}: dtype {tensor.dtype}, one of {', '.join((*FLOATS, FP8))} expected")
    _report(problems, "misshaped", shapes)
    _report(problems, "dtype", dtypes)


def _copies(
    folder: SafetensorsFolder,
    cfg: ModelConfig,
    known: Mapping[str, HFEntry],
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, str], set[str]]:
    """Which tensors are byte-equal copies (name -> main name), and which multi-token leaves stand on their own."""
    by_path: dict[str, list[str]] = {}
    for name, entry in known.items():
        by_path.setdefault(entry.path, []).append(name)
    embed = by_path[EMBED][0]
    head = embed if cfg.tie_word_embeddings else by_path[HEAD][0]
    aliases: dict[str, str] = {}
    own: set[str] = set()
    for path, main in ((HEAD, embed), (MTP_EMBED, embed), (MTP_HEAD, head)):
        if path == HEAD and not cfg.tie_word_embeddings:
            continue
        names = [name for name in by_path.get(path, []) if name in tensors]
        differing = [name for name in names if not same_bytes(tensors[name], tensors[main])]
        if not differing:
            aliases.update(dict.fromkeys(names, main))
        elif path != MTP_EMBED and cfg.tie_word_embeddings:
            raise DataError(
                f"{folder.folder}: tie_word_embeddings is true, but {differing[0]} differs from {main}: "
                "a tied head has no tensor of its own"
            )
        else:
            own.add(path)
    return aliases, own


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """How a folder's tensors are stored: per leaf, and per HF tensor what an export restores (safetensors names).

    Attributes:
      leaves: dtype of each leaf (of its values, where it is quantised).
      tensors: dtype of each exported tensor.
      formats: quantisation format of the leaves that are kept quantised.
      notes: what a user should be told.
    """

    leaves: dict[str, str]
    tensors: dict[str, str]
    formats: dict[str, str]
    notes: list[str]


def choose_dtypes(entries: Iterable[HFEntry], sources: Mapping[str, StoredTensor], dtype: str) -> Dtypes:
    """The storage of every leaf for `dtype` "keep", "BF16" or "F32"; `sources` says where each entry's tensor lies.

    keep records each tensor's own dtype; a stack whose tensors differ is stored in the wider one, which holds
    both exactly; a stack that is quantised in one way throughout stays so. A cast records the dtype that was asked
    for: an export then gives what the user asked, not what the source had. A router bias is stored as float32 and
    keeps its record under every cast.
    """
    leaves: dict[str, str] = {}
    tensors: dict[str, str] = {}
    notes: list[str] = []
    by_path: dict[str, list[StoredTensor]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(sources[entry.name])
    formats: dict[str, str] = {}
    widened = 0
    for path, stack in by_path.items():
        kept = dtype == "keep" or is_router(path)
        coded = [tensor for tensor in stack if tensor.scale is not None]
        kinds = {(t.fmt, t.dtype, None if t.scale is None else t.scale.dtype) for t in stack}
        if kept and coded and len(kinds) == 1:
            formats[path] = coded[0].fmt
            leaves[path] = "BF16"
            tensors.update({tensor.name: tensor.dtype for tensor in stack})
            continue
        tensors.update({tensor.name: tensor.keep_dtype if kept else dtype for tensor in stack})
        found = {tensors[tensor.name] for tensor in stack}
        leaves[path] = "F32" if is_router(path) else widest(found, path)
        if coded and kept:
            widened += len(coded)
            notes.append(
                f"{path}: its tensors are quantised in several ways; the stack is stored as {leaves[path]}"
            )
        elif len(found) > 1:
            mixed = " and ".join(sorted(found))
            notes.append(f"{path}: its tensors are {mixed}; the stack is stored as {leaves[path]}")
    count = sum(tensor.scale is not None for tensor in sources.values())
    if count and dtype == "keep" and count > widened:
        notes.append(f"{count - widened} tensors are stored quantised")
    elif count and dtype != "keep":
        notes.append(f"{count} quantised tensors are dequantised and rounded once to {dtype}")
    return Dtypes(leaves, tensors, formats, notes)
