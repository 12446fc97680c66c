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
from dsv3_jax.inference import speculative, steps
from dsv3_jax.inference.adjustments import begin_count
from dsv3_jax.inference.placement import HERE, Placement
from dsv3_jax.inference.programs import Programs
from dsv3_jax.inference.sampling import Choosing, TokenLogprobs
from dsv3_jax.inference.settings import EngineOptions, exact_dtype, pages_of
from dsv3_jax.inference.table import RowTable
from dsv3_jax.inference.weights import Weights, kinds
from dsv3_jax.model import make_pages
from dsv3_jax.quantization.leaf import implemented


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
        placement: Placement | None = None,
    ) -> None:
        """Args: options: with every default resolved; of all devices together."""
        assert options.pages is not None and options.context is not None
        self.programs = Programs()
        self.table_width = pages_of(options.context, options.page_size)
        self._place = place = placement or Placement()
        weights = implemented(weights, options.kernels.quantized_matmul)
        self._cfg, self._weights, self._options = cfg, place.send_weights(weights), options
        # An id that no token has keeps the array's shape legal when nothing ends a row.
        self._eos_ids = place.send(np.asarray(sorted(set(eos_ids)) or [-2], np.int32))
        self._sizes = steps.Sizes(
            options.pages // place.shards,
            vocab_limit,
            options.max_logprobs,
            options.steps_per_call,
            options.kernels,
            place.dispatch(cfg),
            place.axes,
        )
        self._layers = [place.send(np.int32(layer)) for layer in range(cfg.num_hidden_layers)]
        self._counts_shape = (cfg.num_moe_layers, cfg.n_routed_experts)
        make = functools.partial(make_memory, cfg, options, place.shards)
        self._memory = place.spread(make, (), place.cut, local=False)()()

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
        choosing = RowTable(rows, width, cfg.vocab_size, self._place).choosing()
        place, cut, second = self._place, self._place.cut, self._place.cut_second
        cut_weights, chosen = place.weight_specs(weights), Choosing(cut, cut, HERE)
        result: dict[str, Any] = {}

        def build(
            name: str, function: Any, static: Any, args: Any, specs: Any, donate: Any = (), **how: Any
        ) -> None:
            result[name] = self.programs.compile(
                function, static, args, donate, placement=place, specs=specs, **how
            )

        specs: Any = ((cut_weights.top, cut), cut)
        build("embed", steps.embed, (cfg,), (weights.top, tokens_BT), specs)
        layers = zip(kinds(cfg), weights.layers, cut_weights.layers, strict=True)
        for kind, (variables, own) in {kind: (one, spec) for kind, one, spec in layers}.items():
            layer = (x_BTD, self._memory, variables, tokens_BT, tables_BM, number)
            specs = ((cut, cut, own, cut, cut, HERE), (cut, cut))
            build(kind, steps.prompt_layer, (cfg, kind, sizes), layer, specs, (0, 1))
        end = (weights.top, x_BTD, tokens_BT, _shape((tiles,)), _shape((tiles,)))
        specs = ((cut_weights.top, cut, cut, cut, cut), (cut, cut, cut))
        build("end", steps.prompt_end, (cfg, rows // place.shards), end, specs)
        begin = (self._memory, state, weights.top, hidden_BD, choosing, self._eos_ids, flag)
        specs = ((cut, cut, cut_weights.top, cut, chosen, HERE, HERE), (cut, cut, second))
        build("first", steps.first, (cfg, sizes), begin, specs, (0,))
        count = (self._memory.count_BV, number, number)
        build("count", begin_count, (), count, ((cut, HERE, HERE), cut), (0,), local=False)
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
        specs = ((cut, cut_weights, cut, cut, second, chosen, *[HERE] * 4), (cut, cut, second))
        build("decode", steps.decode, (cfg, sizes), more, specs, (0,))
        if options.speculative:
            ahead = (self._memory, weights, x_BTD, tokens_BT, tokens_BT, tables_BM, *end[3:])
            build(
                "ahead", steps.prompt_ahead, (cfg, sizes), ahead, ((cut, cut_weights, *[cut] * 6), cut), (0,)
            )
            drafting = (*more[:5], _shape((rows,), bool), _shape((rows,)), *more[5:])
            specs = ((*specs[0][:5], cut, cut, *specs[0][5:]), (*specs[1], HERE))
            static: Any = (cfg, sizes, options.speculative)
            build("speculate", speculative.speculate, static, drafting, specs, (0,))
        if sizes.logprobs is not None:
            scored = (weights.top, x_BTD, tokens_BT)
            static = (cfg, sizes.logprobs, steps.SCORE_FLOATS)
            build("score", steps.score, static, scored, ((cut_weights.top, cut, cut), cut))
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
        next_BT: np.ndarray | None = None,
        known_BT: np.ndarray | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tiles of prompts through all layers; see `steps.prompt_layer` and `steps.prompt_end`.

        Args: next_BT, known_BT: the token after each, and its own position where that is known (`prompt_ahead`).
        """
        programs, weights = self._compiled, self._weights
        positions, tables = self._place.send((positions_BT, tables_BM), self._place.cut)
        x_BTD = programs["embed"](weights.top, tokens_BT)
        for at, (kind, variables) in enumerate(zip(kinds(self._cfg), weights.layers, strict=True)):
            x_BTD, self._memory = programs[kind](
                x_BTD, self._memory, variables, positions, tables, self._layers[at]
            )
        found = programs["end"](weights.top, x_BTD, positions, last_B, rows_B)
        if self._options.speculative:
            self._memory = programs["ahead"](
                self._memory, weights, found[0], next_BT, known_BT, tables, last_B, rows_B
            )
        return found

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

    def speculate(
        self,
        state: steps.State,
        tables_BM: jax.Array,
        known_TB: np.ndarray,
        drafting_B: np.ndarray,
        room_B: np.ndarray,
        choosing: Choosing,
        *,
        wanted: bool,
        limit: int,
        until_one_ends: bool,
    ) -> tuple[jax.Array, steps.Produced, jax.Array]:
        """The same with drafts, `limit` rounds; see `speculative.speculate`."""
        self._memory, reason_B, produced, kept_2 = self._compiled["speculate"](
            self._memory,
            self._weights,
            state,
            tables_BM,
            known_TB,
            drafting_B,
            room_B,
            choosing,
            self._eos_ids,
            np.bool_(wanted),
            np.int32(limit),
            np.bool_(until_one_ends),
        )
        return reason_B, produced, kept_2

    def expert_counts(self) -> np.ndarray | None:
        """int32 [expert layers, experts]: tokens sent to each expert since the start, modulo 2**32."""
        if self._memory.counts_LE is None:
            return None
        # A copy: the next call may reuse the buffer.
        counts_sLE = np.array(self._memory.counts_LE).reshape(-1, *self._counts_shape)
        return counts_sLE.sum(0, dtype=np.int32)


def _shape(shape: tuple[int, ...], dtype: Any = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def make_memory(cfg: ModelConfig, options: EngineOptions, shards: int = 1) -> steps.Memory:
    """Empty pages, and what else stays on the device between calls; of all devices, each one's part in one piece."""
    assert options.pages is not None
    layers = options.layers(cfg)
    latent, index = make_pages(
        cfg,
        options.pages,
        options.page_size,
        layers=layers,
        dtype=options.cache_dtype,
        exact_dtype=exact_dtype(cfg),
    )
    counts = None
    if cfg.num_moe_layers:
        counts = jnp.zeros((shards * cfg.num_moe_layers, cfg.n_routed_experts), jnp.int32)
    hidden = jnp.zeros((options.rows, cfg.hidden_size), cfg.dtype) if options.speculative else None
    produced = jnp.zeros((options.rows, cfg.vocab_size), jnp.int32)
    return steps.Memory(latent, index, counts, produced, hidden)
