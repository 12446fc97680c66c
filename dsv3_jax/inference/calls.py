"""From a plan to arrays: the calls of one step, enqueued on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import struct

from dsv3_jax.inference import steps
from dsv3_jax.inference.device import Device
from dsv3_jax.inference.pages import NULL_PAGE
from dsv3_jax.inference.sampling import TokenLogprobs
from dsv3_jax.inference.scheduler import Plan, Sequence, Tile
from dsv3_jax.inference.settings import EngineOptions
from dsv3_jax.inference.speculative import rounds
from dsv3_jax.inference.table import RowTable


@struct.dataclass
class PromptsFound:
    """What a call of tiles found.

    Attributes:
      finite_B: whether all of a tile is finite.
      scored: log-probabilities of the tokens after each, and whether their logits are finite; None if nobody asked.
      first: reasons and tokens of the rows whose prompt is complete; None without such rows.
    """

    finite_B: Any
    scored: tuple[TokenLogprobs, Any] | None
    first: tuple[Any, steps.Produced] | None


@struct.dataclass
class RowsFound:
    """Reasons [B] and tokens of a decode call; and the drafts that were checked and kept, None without drafting."""

    reason_B: Any
    produced: steps.Produced
    kept_2: Any = None


def starting(tiles: list[Tile]) -> list[Sequence]:
    """Sequences whose first new token follows from these tiles."""
    ends = [tile.sequence for tile in tiles if tile.stop == len(tile.sequence.prompt)]
    return [sequence for sequence in ends if sequence.max_new and not sequence.new]


def places(tiles: list[Tile], options: EngineOptions, shards: int = 1) -> list[int]:
    """Where in the call each tile is: among those of the device that has its row."""
    height, each = options.rows // shards, options.prefill_tiles // shards
    used = [0] * shards
    found = []
    for tile in tiles:
        shard = tile.sequence.row // height
        found.append(shard * each + used[shard])
        used[shard] += 1
    return found


def prefill(
    device: Device,
    options: EngineOptions,
    table: RowTable,
    tiles: list[Tile],
    *,
    score: bool,
    wanted: bool,
    shards: int = 1,
) -> PromptsFound:
    """Tiles of prompts, and the first new token of those that are complete.

    Args:
      shards: devices that rows and tiles are cut over.
      score: whether any prompt's tokens are to be scored.
      wanted: whether log-probabilities of new tokens are wanted.
    """
    shape = (options.prefill_tiles, options.tile)
    tokens_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions_BT, known_BT = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    tables_BM = np.full((shape[0], device.table_width), NULL_PAGE, np.int32)
    last_B, rows_B = np.zeros(shape[0], np.int32), np.full(shape[0], options.rows, np.int32)
    height = options.rows // shards
    for at, tile in zip(places(tiles, options, shards), tiles, strict=True):
        prompt, count = tile.sequence.prompt, tile.stop - tile.start
        tokens_BT[at, :count] = prompt[tile.start : tile.stop]
        positions_BT[at, :count] = np.arange(tile.start, tile.stop)
        tables_BM[at] = table.tables_BM[tile.sequence.row]
        following = prompt[tile.start + 1 : tile.stop + 1]
        targets_BT[at, : len(following)] = following
        known_BT[at, : len(following)] = positions_BT[at, : len(following)]
        if tile.stop == len(prompt):
            last_B[at], rows_B[at] = count - 1, tile.sequence.row % height
    ahead = (targets_BT, known_BT) if options.speculative else ()
    hidden_BTD, hidden_BD, finite_B = device.prefill(
        tokens_BT, positions_BT, tables_BM, last_B, rows_B, *ahead
    )
    scored = device.score(hidden_BTD, targets_BT) if score else None
    first = None
    if begin := starting(tiles):
        state = _state(options.rows, begin)
        for sequence in begin:
            state.position_B[sequence.row] = len(sequence.prompt) - 1
            state.left_B[sequence.row] = sequence.max_new
        first = device.first(state, hidden_BD, table.choosing(), wanted)
    return PromptsFound(finite_B, scored, first)


def decode(
    device: Device,
    options: EngineOptions,
    table: RowTable,
    plan: Plan,
    *,
    wanted: bool,
    until_one_ends: bool,
    drafting: list[Sequence] | None = None,
) -> RowsFound:
    """The rows of a plan, each from its first token that is not in the pages.

    Args:
      drafting: sequences that are decoded with drafts; None for a call without any.
    """
    state = _state(options.rows, plan.decode)
    known_TB = np.full((options.steps_per_call, options.rows), steps.NO_TOKEN, np.int32)
    for sequence in plan.decode:
        row, written = sequence.row, sequence.written
        state.token_B[row] = sequence.new[written - len(sequence.prompt)]
        state.position_B[row] = written
        state.left_B[row] = sequence.left
        if written + 1 < sequence.length:
            known = sequence.known(written + 1, written + 1 + options.steps_per_call)
            known_TB[: len(known), row] = known
    if drafting is not None:
        drafting_B, room_B = np.zeros(options.rows, bool), np.zeros(options.rows, np.int32)
        drafting_B[[sequence.row for sequence in drafting]] = True
        for sequence in plan.decode:
            room_B[sequence.row] = len(sequence.pages) * options.page_size
        more = device.speculate(
            state,
            table.tables(),
            known_TB,
            drafting_B,
            room_B,
            table.choosing(),
            wanted=wanted,
            limit=rounds(plan.steps, options.speculative),
            until_one_ends=until_one_ends,
        )
        return RowsFound(*more)
    found = device.decode(
        state,
        table.tables(),
        known_TB,
        table.choosing(),
        wanted=wanted,
        limit=plan.steps,
        until_one_ends=until_one_ends,
    )
    return RowsFound(*found)


def _state(rows: int, live: list[Sequence]) -> steps.State:
    """Numpy arrays; only the given sequences are live."""
    state = steps.State(*(np.zeros(rows, np.int32) for _ in range(4)))
    state.reason_B[:] = steps.STOP
    state.reason_B[[sequence.row for sequence in live]] = steps.LIVE
    return state
