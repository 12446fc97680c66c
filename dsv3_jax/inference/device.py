"""The engine's side of the device: weights, pages, and the compiled programs, each of one fixed shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference import steps
from dsv3_jax.inference.adjustments import begin_count
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.sampling import Choosing, TokenLogprobs
from dsv3_jax.inference.settings import EngineOptions, pages_of
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import Weights, kinds
from dsv3_jax.model import make_pages


class Device:
    """Calls are enqueued; what they return is on the device until it is asked for.

    Attributes:
      programs: what was compiled.
      table_width: pages of a row.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Weights,
        options: EngineOptions,
        *,
        eos_ids: Sequence[int],
        vocab_limit: int,
    ) -> None:
        """Args: options: with every default resolved."""
        assert options.pages is not None and options.context is not None
        self.programs = Programs()
        self.table_width = pages_of(options.context, options.page_size)
        self._cfg, self._weights, self._options = cfg, weights, options
        # An id that no token has keeps the array's shape legal when nothing ends a row.
        self._eos_ids = jax.device_put(np.asarray(sorted(set(eos_ids)) or [-2], np.int32))
        self._sizes = steps.Sizes(
            options.pages, vocab_limit, options.max_logprobs, options.steps_per_call, options.kernels
        )
        self._layers = [jax.device_put(np.int32(layer)) for layer in range(cfg.num_hidden_layers)]
        self._memory = jax.jit(functools.partial(make_memory, cfg, options))()

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        """Every program, from shapes alone."""
        cfg, options, sizes, weights = self._cfg, self._options, self._sizes, self._weights
        rows, tiles, tile, width = options.rows, options.prefill_tiles, options.tile, self.table_width
        x_BTD = _shape((tiles, tile, cfg.hidden_size), cfg.dtype)
        hidden_BD = _shape((rows, cfg.hidden_size), cfg.dtype)
        tokens_BT, tables_BM = _shape((tiles, tile)), _shape((tiles, width))
        state = steps.State(*[_shape((rows,))] * 4)
        flag, number = _shape((), bool), _shape(())
        choosing = RowTable(rows, width, cfg.vocab_size).choosing()
        build = self.programs.compile
        result = {"embed": build(steps.embed, (cfg,), (weights.top, tokens_BT))}
        for kind, variables in dict(zip(kinds(cfg), weights.layers, strict=True)).items():
            one = (x_BTD, self._memory, variables, tokens_BT, tables_BM, number)
            result[kind] = build(steps.prompt_layer, (cfg, kind, sizes), one, (0, 1))
        end = (weights.top, x_BTD, tokens_BT, _shape((tiles,)), _shape((tiles,)))
        result["end"] = build(steps.prompt_end, (cfg, rows), end)
        begin = (self._memory, state, weights.top, hidden_BD, choosing, self._eos_ids, flag)
        result["first"] = build(steps.first, (cfg, sizes), begin, (0,))
        result["count"] = build(begin_count, (), (self._memory.count_BV, number, number), (0,))
        more = (
            self._memory,
            weights,
            state,
            _shape((rows, width)),
            _shape((sizes.steps, rows)),
            choosing,
            self._eos_ids,
            flag,
            number,
            flag,
        )
        result["decode"] = build(steps.decode, (cfg, sizes), more, (0,))
        if sizes.logprobs is not None:
            scored = (weights.top, x_BTD, tokens_BT)
            result["score"] = build(steps.score, (cfg, sizes.logprobs, steps.SCORE_FLOATS), scored)
        return result

    def compile(self) -> None:
        """Compile whatever is not compiled yet."""
        _ = self._compiled

    def prefill(
        self,
        tokens_BT: np.ndarray,
        positions_BT: np.ndarray,
        tables_BM: np.ndarray,
        last_B: np.ndarray,
        rows_B: np.ndarray,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tiles of prompts through all layers; see `steps.prompt_layer` and `steps.prompt_end`."""
        programs, weights = self._compiled, self._weights
        positions, tables = jax.device_put((positions_BT, tables_BM))
        x_BTD = programs["embed"](weights.top, tokens_BT)
        for at, (kind, variables) in enumerate(zip(kinds(self._cfg), weights.layers, strict=True)):
            x_BTD, self._memory = programs[kind](
                x_BTD, self._memory, variables, positions, tables, self._layers[at]
            )
        return programs["end"](weights.top, x_BTD, positions, last_B, rows_B)

    def score(self, hidden_BTD: jax.Array, targets_BT: np.ndarray) -> tuple[TokenLogprobs, jax.Array]:
        """Log-probabilities of the tokens that follow; see `steps.score`."""
        return self._compiled["score"](self._weights.top, hidden_BTD, targets_BT)

    def first(
        self, state: steps.State, hidden_BD: jax.Array, choosing: Choosing, wanted: bool
    ) -> tuple[jax.Array, steps.Produced]:
        """The first new token of every live row."""
        self._memory, reason_B, produced = self._compiled["first"](
            self._memory, state, self._weights.top, hidden_BD, choosing, self._eos_ids, np.bool_(wanted)
        )
        return reason_B, produced

    def begin_count(self, row: int, token: int) -> None:
        """A request with penalties begins on a row; see `adjustments.begin_count`."""
        count_BV = self._compiled["count"](self._memory.count_BV, np.int32(row), np.int32(token))
        self._memory = dataclasses.replace(self._memory, count_BV=count_BV)

    def decode(
        self,
        state: steps.State,
        tables_BM: jax.Array,
        known_TB: np.ndarray,
        choosing: Choosing,
        *,
        wanted: bool,
        limit: int,
        until_one_ends: bool,
    ) -> tuple[jax.Array, steps.Produced]:
        """Up to `limit` tokens for every live row; see `steps.decode`."""
        self._memory, reason_B, produced = self._compiled["decode"](
            self._memory,
            self._weights,
            state,
            tables_BM,
            known_TB,
            choosing,
            self._eos_ids,
            np.bool_(wanted),
            np.int32(limit),
            np.bool_(until_one_ends),
        )
        return reason_B, produced

    def expert_counts(self) -> np.ndarray | None:
        """int32 [expert layers, experts]: tokens sent to each expert since the start, modulo 2**32."""
        counts_LE = self._memory.counts_LE
        # A copy: the next call may reuse the buffer.
        return None if counts_LE is None else np.array(counts_LE)


def _shape(shape: tuple[int, ...], dtype: Any = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def make_memory(cfg: ModelConfig, options: EngineOptions) -> steps.Memory:
    """Empty pages, and what else stays on the device between calls."""
    assert options.pages is not None
    latent, index = make_pages(cfg, options.pages, options.page_size, dtype=options.cache_dtype)
    counts = jnp.zeros((cfg.num_moe_layers, cfg.n_routed_experts), jnp.int32) if cfg.num_moe_layers else None
    return steps.Memory(latent, index, counts, jnp.zeros((options.rows, cfg.vocab_size), jnp.int32))
