"""Where a run's state comes from and goes to: its own checkpoints, or the weights of another model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from dsv3_jax.checkpoint import (
    latest_step,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_aside,
    step_folder,
    steps_of,
)
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.parallel import barrier, from_first, processes
from dsv3_jax.training.run_folder import HF, TOKENIZER
from dsv3_jax.training.step import State, abstract_state

_MOMENTS = ("count", "mu", "nu")
Say = Callable[[str], None]


def save_step(run: Path, cfg: RunConfig, state: State, train_state: dict[str, Any]) -> Path:
    """Commit checkpoints/<step>, then drop the oldest beyond `checkpoint.keep`.

    Of several processes the first writes; the others take part in gathering the state and wait.
    """
    step = int(state.step)
    folder = step_folder(run, step)
    state = _gathered(state)
    if processes().first:
        _write_step(run, folder, cfg, step, state, train_state)
    barrier("saved")
    return folder


def _gathered(state: State) -> State:
    """The state where one process can read all of it."""
    if processes().count == 1:
        return state

    def whole(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, state)


def _write_step(
    run: Path, folder: Path, cfg: RunConfig, step: int, state: State, train_state: dict[str, Any]
) -> None:
    save_checkpoint(
        folder,
        cfg.model,
        {"params": state.params, "router": state.router},
        step=step,
        optimizer={name: optax.tree_utils.tree_get(state.opt_state, name) for name in _MOMENTS},
        train_state=train_state,
        tokenizer_dir=run / TOKENIZER if (run / TOKENIZER).is_dir() else None,
        hf_dir=run / HF if (run / HF).is_dir() else None,
    )
    if cfg.checkpoint.keep:
        for old in steps_of(run)[: -cfg.checkpoint.keep]:
            _remove(step_folder(run, old))


def _remove(folder: Path) -> None:
    # First out of sight, so that a kill in the middle leaves no half of a step.
    doomed = folder.with_name(f".{folder.name}.writing-removed")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def restore_step(
    run: Path, cfg: RunConfig, mesh: jax.sharding.Mesh, say: Say
) -> tuple[State, dict[str, Any]] | None:
    """State and train_state of the newest good step, or None where there is none.

    Every byte is compared with the manifest. A bad newer step is renamed to N.corrupt, and that is said.
    """
    step = from_first("restore", lambda: _newest_good(run, say))
    if step is None:
        return None
    want = abstract_state(cfg, mesh)
    loaded = load_checkpoint(
        step_folder(run, step),
        {"params": want.params, "router": want.router},
        optimizer_abstract={name: optax.tree_utils.tree_get(want.opt_state, name) for name in _MOMENTS},
    )
    if loaded.train_state is None:
        raise DataError(f"{step_folder(run, step)}: holds no train_state.json")
    state = State(
        jax.device_put(jax.numpy.int32(step), want.step.sharding),
        loaded.variables["params"],
        loaded.variables["router"],
        optax.tree_utils.tree_set(want.opt_state, **loaded.optimizer),
    )
    return state, loaded.train_state


def _newest_good(run: Path, say: Say) -> int | None:
    checkpoints = run / "checkpoints"
    if not checkpoints.is_dir():
        return None
    remove_leftovers(checkpoints)
    step, bad = latest_step(run, hashes=True)
    for number, problems in bad.items():
        aside = set_aside(step_folder(run, number))
        say(f"WARNING: checkpoint {number} is damaged and set aside as {aside.name}: {problems[0]}")
    if step is None:
        if bad:
            say("WARNING: no good checkpoint is left; the run begins again at step 1")
    elif bad:
        say(f"WARNING: going back to the checkpoint of step {step}")
    return step


def open_init(cfg: RunConfig) -> Source | None:
    """The checkpoint of `init.checkpoint`, its shapes compared with the model's; None where none is asked for.

    Raises ConfigError naming each tensor that does not fit.
    """
    if cfg.init.checkpoint is None:
        return None
    source = open_source(cfg.init.checkpoint, abstract_variables)
    have, want = flatten_paths(source.abstract), flatten_paths(abstract_variables(cfg.model))
    problems = [
        f"{path}: {list(have[path].shape) if path in have else 'missing'}, expected {list(want[path].shape)}"
        for path in want
        if (path in have or not _is_mtp(path)) and (path not in have or have[path].shape != want[path].shape)
    ]
    problems += [f"{path}: not part of the model" for path in have if path not in want and not _is_mtp(path)]
    if problems:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ConfigError(
            "\n  ".join([f"init.checkpoint {source.folder} does not fit the model:", *problems[:12], *more])
        )
    return source


def init_notes(cfg: RunConfig, source: Source) -> list[str]:
    """What the user should know about starting from `source`."""
    notes = [*source.notes, f"weights of {source.folder}, fresh optimiser"]
    for field in dataclasses.fields(ModelConfig):
        have, want = getattr(source.cfg, field.name), getattr(cfg.model, field.name)
        if have != want and field.name not in ("dtype", "initializer_range", "num_nextn_predict_layers"):
            notes.append(f"note: model.{field.name} is {want!r}, in the checkpoint {have!r}")
    if cfg.model.num_nextn_predict_layers and not source.cfg.num_nextn_predict_layers:
        notes.append("the checkpoint has no multi-token module: it is initialised from the seed")
    if source.cfg.num_nextn_predict_layers and not cfg.model.num_nextn_predict_layers:
        notes.append("the checkpoint's multi-token module is left out (model.num_nextn_predict_layers is 0)")
    return notes


def init_weights(cfg: RunConfig, source: Source) -> dict[str, Any]:
    """float32 variables from `source`; a multi-token module it lacks is initialised from the seed."""
    want = flatten_paths(abstract_variables(cfg.model))
    leaves = {path: leaf for path, leaf in flatten_paths(source.load("float32")).items() if path in want}
    if set(want) - set(leaves):
        fresh = flatten_paths(jax.jit(lambda key: init_variables(cfg.model, key))(jax.random.key(cfg.seed)))
        leaves.update({path: fresh[path] for path in want if path not in leaves})
    return {"params": {}, "router": {}, **unflatten_paths(leaves)}


def _is_mtp(path: str) -> bool:
    return path.split("/")[1] == "mtp"
