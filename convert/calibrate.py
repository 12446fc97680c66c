"""Calibration for GPTQ: our own model over real text, one layer at a time.

Layer by layer: read its weights, run the calibration tokens through it and collect, for every matrix, the sum of outer
products of its inputs; round its matrices; run the tokens through the rounded layer, whose outputs are the next layer's
inputs. Only one layer's weights and one batch of activations are on the device; the hidden states of all calibration
tokens stay in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from dsv3_jax.checkpoint.source import Source
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.plan import in_mtp
from dsv3_jax.hf.rules import HFEntry, flatten_paths, layer_offset, unflatten_paths
from dsv3_jax.hf.safetensors import DTYPES
from dsv3_jax.model.attention import Context
from dsv3_jax.model.block import Block
from dsv3_jax.model.rope import rope_tables
from dsv3_jax.quantization import awq
from dsv3_jax.quantization.clipping import quantize_clipped
from dsv3_jax.quantization.formats import Format, Parts, parse_format, quantize
from dsv3_jax.quantization.gptq import Factor, factor, gptq_each, joined
from dsv3_jax.quantization.leaf import quantized_leaf
from dsv3_jax.quantization.recorded import Moments, Recorded
from dsv3_jax.text import Tokenizer

Kind = Literal["dense", "moe"]
Rounding = Literal["gptq", "awq"]

SEQUENCE = 512
"""Tokens of one calibration sequence, at most, where nothing else is asked for."""

PRIOR = 64.0
"""An expert's moments count as if this many inputs of the average expert had been seen too."""

MOST_EXPERT_BYTES = 4 << 30
"""Larger sets of moments, one matrix an expert, give way to one matrix for all experts of a layer."""


class Calibrated:
    """GPTQ's codes of every tensor, made layer by layer as they are asked for.

    Leaves outside the layers, and the multi-token module, are rounded to nearest.

    Raises:
      ConfigError: no tokenizer, or a text that gives too few tokens.
    """

    def __init__(
        self,
        source: Source,
        formats: dict[str, str],
        text: Path,
        tokens: int,
        window: int | None = None,
        rounding: Rounding = "gptq",
        *,
        act_order: bool = True,
        quiet: bool = True,
    ) -> None:
        self._rounding, self._act_order = rounding, act_order
        # A leaf that stays in the format it is stored in is not rounded: it multiplies with the values it has.
        self._formats = {path: fmt for path, fmt in formats.items() if source.formats.get(path) != fmt}
        self._source, self._quiet = source, quiet
        self._cfg = dataclasses.replace(
            source.cfg,
            dtype="float32",
            num_nextn_predict_layers=0,
            mtp_own_embedding=False,
            mtp_own_head=False,
        )
        self._tokens_BT = read_tokens(source, text, tokens, window)
        self._moments = Moments()
        self._priors: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._hidden_BTD: np.ndarray | None = None
        self._layer = -1
        self._parts: dict[str, Parts] = {}
        self._leaves: dict[str, np.ndarray] = {}
        self._scales: list[dict[str, np.ndarray]] = []
        self._folded: dict[str, np.ndarray] = {}
        self._folded_layer = -1

    def __str__(self) -> str:
        """What the result depends on besides the weights."""
        order = " by activations" if self._act_order and self._rounding == "gptq" else ""
        what = f"{self._rounding}{order} {self._tokens_BT.shape}".encode() + self._tokens_BT.tobytes()
        return hashlib.sha256(what).hexdigest()

    def in_order(self, entries: list[HFEntry]) -> list[HFEntry]:
        """Entries in the order in which their codes can be made: layer after layer."""
        return sorted(entries, key=self._layer_of)

    def pieces(self, entry: HFEntry, part: str) -> Iterator[np.ndarray]:
        """The flat pieces of "codes", "scales" or "zeros" of one tensor; tensors must be asked for in order."""
        with self._lock:
            parts = self._parts_of(entry)
        piece = getattr(parts, part)
        assert piece is not None, (entry.name, part)
        yield np.ascontiguousarray(piece).reshape(-1)

    def changes(self, entry: HFEntry) -> bool:
        """Whether a tensor that is not rounded may yet have scales folded in: then `floats` has it."""
        within = _within(entry.path)
        return (
            self._rounding == "awq"
            and self._layer_of(entry) >= 0
            and any(within == one.source or within in one.readers for one in awq.FOLDS)
        )

    def floats(self, entry: HFEntry, stored: str) -> Iterator[np.ndarray]:
        """The flat values of one tensor as they are to be stored. Raises DataError where the type cannot hold them."""
        with self._lock:
            self._reach(self._layer_of(entry))
            block = self._leaves[entry.path][entry.index[1:]].reshape(-1)
        piece = block.astype(DTYPES[stored])
        if not np.array_equal(piece.astype(np.float32), block):
            raise DataError(f"{entry.name}: scaled by powers of two it does not fit {stored}")
        yield piece

    def before(self, entry: HFEntry) -> Iterator[np.ndarray]:
        """The flat float32 values that a tensor's codes stand for: its own, with scales folded in."""
        layer = self._layer_of(entry)
        if self._rounding != "awq" or layer < 0:
            yield from self._source.tensors[entry.name].pieces("F32")
            return
        with self._lock:
            self._reach(layer)
            if self._folded_layer != layer:
                leaves = self._read(self._of_layer(layer))
                self._folded, self._folded_layer = self._fold(leaves, self._scales[layer]), layer
        yield self._folded[entry.path][entry.index[1:]].reshape(-1)

    def _layer_of(self, entry: HFEntry) -> int:
        if in_mtp(entry.path) or not entry.index or entry.path.split("/")[1] not in ("dense", "moe"):
            return -1
        return layer_offset(self._source.cfg, entry.path) + entry.index[0]

    def _parts_of(self, entry: HFEntry) -> Parts:
        layer = self._layer_of(entry)
        if layer < 0:
            matrix = self._source.tensors[entry.name].read("F32")
            return quantize(matrix, parse_format(self._formats[entry.path]))
        self._reach(layer)
        return self._parts[entry.name]

    def _reach(self, layer: int) -> None:
        while self._layer < layer:
            self._next_layer()

    def _of_layer(self, layer: int) -> list[HFEntry]:
        return [entry for entry in self._source.entries if self._layer_of(entry) == layer]

    def _next_layer(self) -> None:
        cfg = self._cfg
        if self._hidden_BTD is None:
            self._hidden_BTD = self._embed()
        self._layer += 1
        kind: Kind = "dense" if self._layer < cfg.num_dense_layers else "moe"
        entries = self._of_layer(self._layer)
        leaves = self._read(entries)
        self._moments.clear()
        self._priors.clear()
        columns = {entry.path: entry.hf_shape[-1] for entry in entries}
        recorded = {
            path: Recorded(
                jnp.asarray(leaf), path, self._moments.add, columns[path], _apart(columns[path], leaf.shape)
            )
            if path in self._formats
            else leaf
            for path, leaf in leaves.items()
        }
        self._run(kind, recorded, keep=False)
        if self._rounding == "awq":
            self._scales.append(self._find_scales(leaves))
            leaves = self._fold(leaves, self._scales[-1])
        self._parts, self._leaves = self._round(entries, leaves), leaves
        self._run(kind, self._rounded(entries, leaves), keep=True)
        if not self._quiet:
            print(f"calibrated layer {self._layer + 1} of {cfg.num_hidden_layers}", file=sys.stderr)

    def _embed(self) -> np.ndarray:
        (entry,) = (entry for entry in self._source.entries if entry.path == "params/embed_VD")
        table_VD = self._source.tensors[entry.name].read("F32")
        return table_VD[self._tokens_BT]

    def _read(self, entries: list[HFEntry]) -> dict[str, np.ndarray]:
        """The leaves of one layer, float32, without their layer axis."""
        shapes = flatten_paths(self._source.abstract)
        leaves: dict[str, np.ndarray] = {}
        for entry in entries:
            leaf = leaves.setdefault(entry.path, np.empty(shapes[entry.path].shape[1:], np.float32))
            self._source.tensors[entry.name].read_into(leaf[entry.index[1:]].reshape(-1))
        return leaves

    def _run(self, kind: Kind, leaves: dict[str, Any], *, keep: bool) -> None:
        """The calibration tokens through one layer, in batches; its outputs take the place of the inputs if kept."""
        stack = {"params": f"params/{kind}/", "router": f"router/{kind}/"}
        variables = {
            name: unflatten_paths(
                {p.removeprefix(prefix): leaf for p, leaf in leaves.items() if p.startswith(prefix)}
            )
            for name, prefix in stack.items()
        }
        hidden_BTD = self._hidden_BTD
        assert hidden_BTD is not None
        for start in range(0, len(hidden_BTD), _ROWS):
            rows = slice(start, start + _ROWS)
            out = jax.block_until_ready(_layer(self._cfg, kind, variables, hidden_BTD[rows]))
            jax.effects_barrier()
            if keep:
                hidden_BTD[rows] = np.asarray(out)

    def _round(self, entries: list[HFEntry], leaves: dict[str, np.ndarray]) -> dict[str, Parts]:
        """Codes of the layer's tensors by name, leaf by leaf."""
        found: dict[str, Parts] = {}
        factors: dict[str, Factor] = {}
        for path, own in _by_path(entries, self._formats).items():
            fmt, K = parse_format(self._formats[path]), own[0].hf_shape[-1]
            sums = self._moments.sums.get(path)
            # Tensors that share a moment matrix (an expert's gate and up) lie on top of each other, as in the leaf.
            apart = len(leaves[path]) if sums is not None and sums.ndim == 3 else 1
            matrices_BRK = leaves[path].reshape(apart, -1, K)
            try:
                if sums is None:
                    parts = quantize(matrices_BRK, fmt)
                elif self._rounding == "awq":
                    parts = self._clipped(path, matrices_BRK, fmt)
                else:
                    parts = gptq_each(matrices_BRK, self._factors(path, factors), fmt)
            except DataError as error:
                raise DataError(f"{path}, layer {own[0].index[0]}: {error}") from None
            rows = own[0].hf_shape[0]
            stack = parts.map(lambda part, rows=rows: part.reshape(-1, rows, part.shape[-1]))  # type: ignore[misc]
            for i, entry in enumerate(own):
                found[entry.name] = stack.map(lambda part, i=i: part[i])  # type: ignore[misc]
        return found

    def _factors(self, path: str, known: dict[str, Factor]) -> Callable[[int], Factor]:
        """The factor of a leaf's moments; of experts each its own moments and PRIOR inputs of the average expert.

        Args:
          known: factors of the layer so far: leaves with the same inputs (q_a and kv_a) share theirs.
        """
        sums, counts = self._moments.sums, self._moments.counts[path]
        if counts.ndim:
            self._prior(path)  # once, before threads ask for it
            return lambda expert: factor(
                self._moment(path, expert) / (counts[expert] + PRIOR), self._act_order
            )
        like = next((other for other in known if np.array_equal(sums[other], sums[path])), path)
        if like not in known:
            with threadpool_limits(1):  # see gptq_each
                known[like] = factor(sums[like], self._act_order)
        return lambda _: known[like]

    def _find_scales(self, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """AWQ's scales of the layer whose moments were recorded last."""
        if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
            raise DataError(f"layer {self._layer}: a weight that is not finite cannot be quantised")
        within = {_within(path): path for path in leaves}
        formats = {
            name: parse_format(self._formats[path])
            for name, path in within.items()
            if path in self._moments.sums
        }
        kept = {
            name
            for name, path in within.items()
            if path in self._source.formats and path not in self._formats
        }
        for path in self._moments.sums:
            if self._moments.sums[path].ndim == 3:
                self._prior(path)  # once, before threads ask for it
        return awq.layer_scales(
            {name: leaves[path] for name, path in within.items()},
            formats,
            lambda name, expert: self._moment(within[name], expert),
            kept,
        )

    def _moment(self, path: str, expert: int) -> np.ndarray:
        """Sum of x x^T of a leaf, or of one of its experts and of PRIOR inputs of the average one."""
        sums = self._moments.sums[path]
        return sums if sums.ndim == 2 else sums[expert] + self._prior(path)

    def _prior(self, path: str) -> np.ndarray:
        """PRIOR inputs of the average expert."""
        if path not in self._priors:
            total = max(int(self._moments.counts[path].sum()), 1)
            self._priors[path] = self._moments.sums[path].sum(0) * (PRIOR / total)
        return self._priors[path]

    def _fold(self, leaves: dict[str, np.ndarray], scales: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        cfg = self._cfg
        values = slice(cfg.qk_nope_head_dim, cfg.qk_nope_head_dim + cfg.v_head_dim)
        within = {_within(path): path for path in leaves}
        changed = awq.folded({name: leaves[path] for name, path in within.items()}, scales, values)
        return {within[name]: leaf for name, leaf in changed.items()}

    def _clipped(self, path: str, matrices_BRK: np.ndarray, fmt: Format) -> Parts:
        """To nearest, with clippings chosen by what inputs see of the error."""
        scales_BK = awq.column_scales(_within(path), self._scales[-1])
        found = []
        for b, matrix_RK in enumerate(matrices_BRK):
            cost_K = np.sqrt(np.maximum(np.diagonal(self._moment(path, b)), 0))
            if scales_BK is not None:
                cost_K = cost_K / scales_BK[b if len(scales_BK) > 1 else 0]
            found.append(quantize_clipped(matrix_RK, cost_K, fmt))
        return joined(found, 0).map(lambda part: part.reshape(len(matrices_BRK), -1, part.shape[-1]))

    def _rounded(self, entries: list[HFEntry], leaves: dict[str, np.ndarray]) -> dict[str, Any]:
        """The layer as it will be: quantised leaves from the codes just made."""
        result: dict[str, Any] = dict(leaves)
        for path, own in _by_path(entries, self._formats).items():
            lead = leaves[path].shape[: len(own[0].index) - 1]
            parts = [
                None
                if first is None
                else np.stack([getattr(self._parts[e.name], part) for e in own]).reshape(*lead, *first.shape)
                for part in ("codes", "scales", "zeros")
                for first in [getattr(self._parts[own[0].name], part)]
            ]
            coding = parse_format(self._formats[path]).coding(own[0].hf_shape[-1])
            result[path] = quantized_leaf(parts, coding, own[0].block_shape)
        return result


_ROWS = 8


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(cfg: Any, kind: Kind, variables: Any, x_BTD: jax.Array) -> jax.Array:
    B, T, _ = x_BTD.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None, :], (B, T))
    ctx = Context(rope_tables(cfg, positions_BT), positions_BT, None, positions_BT >= 0)
    (x_BTD, _), _ = Block(cfg, kind, "expanded").apply(variables, (x_BTD, None), jnp.int32(0), ctx)
    return x_BTD


def _within(path: str) -> str:
    """A leaf's path within its stack: "params/moe/mlp_norm_D" -> "mlp_norm_D"."""
    return path.split("/", 2)[-1]


def _by_path(entries: list[HFEntry], formats: Mapping[str, str]) -> dict[str, list[HFEntry]]:
    """The tensors of each leaf that is rounded, in leaf order."""
    found: dict[str, list[HFEntry]] = {}
    for entry in entries:
        if entry.path in formats:
            found.setdefault(entry.path, []).append(entry)
    return found


def _apart(columns: int, shape: tuple[int, ...]) -> bool:
    """Whether experts have moments of their own: those of all, float32 on the device and float64 here, may be held."""
    return shape[0] * columns * columns * 12 <= MOST_EXPERT_BYTES


def read_tokens(
    source: Source,
    text: Path,
    tokens: int,
    window: int | None = None,
    flag: str = "--calibration",
) -> np.ndarray:
    """int32 [sequences, T] from a UTF-8 text file.

    Args:
      window: T, by default SEQUENCE; less where the model's positions or the tokens are fewer.
      flag: the text's, for messages; of the others "-tokens" and "-window" follow it, or stand alone after "--text".

    Raises:
      ConfigError: the file cannot be read or gives fewer tokens than one sequence.
      DataError: a token that the model does not have.
    """
    prefix = flag if flag == "--calibration" else "-"
    if tokens < 256:
        raise ConfigError(f"{prefix}-tokens is {tokens}; 256 or more expected")
    if window is not None and window < 16:
        raise ConfigError(f"{prefix}-window is {window}; 16 or more expected")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {text}: {error}") from error
    tokenizer = None if source.tokenizer_dir is None else Tokenizer.load(source.tokenizer_dir)
    tokenizer = tokenizer or Tokenizer.bytes()
    ids = np.asarray(tokenizer.encode_text(content[: tokens * 16]), np.int32)[:tokens]
    length = min(window or SEQUENCE, source.cfg.max_position_embeddings, tokens)
    if len(ids) < length:
        raise ConfigError(f"{flag} {text}: {len(ids)} tokens; at least {length} needed")
    if int(ids.max()) >= source.cfg.vocab_size:
        raise DataError(
            f"{text}: token id {int(ids.max())} is not below vocab_size = {source.cfg.vocab_size}"
        )
    return ids[: len(ids) // length * length].reshape(-1, length)
