"""Where a run's state comes from: its own checkpoints, or the weights of another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dsv3_jax.checkpoint import (
    load_checkpoint,
    remove_leftovers,
    set_aside,
    step_folder,
    steps_of,
    validate_step,
)
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.errors import ConfigError, DataError, StorageError
from dsv3_jax.finetune.base import FrozenBase
from dsv3_jax.finetune.files import check_base
from dsv3_jax.hf.rules import flatten_paths, unflatten_paths
from dsv3_jax.model import abstract_variables, init_variables
from dsv3_jax.parallel import processes
from dsv3_jax.training.guards import guard_from_json
from dsv3_jax.training.saving import MOMENTS
from dsv3_jax.training.step import State, abstract_state, state_shardings, with_frozen

Say = Callable[[str], None]


def restore_step(
    run: Path, cfg: RunConfig, mesh: jax.sharding.Mesh, say: Say, base: FrozenBase | None = None
) -> tuple[State, dict[str, Any]] | None:
    """State and train_state of the newest good step, or None where there is none.

    Every byte is compared with the manifest, by several processes together; they use the same step. A bad newer step
    is renamed to N.corrupt, and that is said. A LoRA run's steps hold pairs; its base comes from where it is.

    Raises ConfigError for another base than the run began with.
    """
    step = newest_good_step(run, say)
    if step is None:
        return None
    want = abstract_state(cfg, mesh, base)
    if base is not None:
        check_base(step_folder(run, step), base)
    loaded = load_checkpoint(
        step_folder(run, step),
        {"params": want.params, "router": want.router if base is None else {}},
        optimizer_abstract={name: optax.tree_utils.tree_get(want.opt_state, name) for name in MOMENTS},
    )
    if loaded.train_state is None:
        raise DataError(f"{step_folder(run, step)}: holds no train_state.json")
    state = State(
        _everywhere(np.int32(step), want.step),
        loaded.variables["params"],
        loaded.variables["router"],
        optax.tree_utils.tree_set(want.opt_state, **loaded.optimizer),
        jax.tree.map(_everywhere, guard_from_json(loaded.train_state.get("guard")), want.guard),
    )
    if base is not None:
        state = with_frozen(state, state_shardings(cfg, mesh, base), base)
    return state, loaded.train_state


def newest_good_step(run: Path, say: Say) -> int | None:
    """The newest step of which every byte is right, the same in all processes; bad newer ones are set aside."""
    group = processes()
    if group.first and (run / "checkpoints").is_dir():
        remove_leftovers(run / "checkpoints")
    seen = group.exchange("restore/steps", steps_of(run))
    if any(steps != seen[0] for steps in seen):
        raise StorageError(
            f"{run}: the processes see different steps there ({seen}): it must be a shared folder"
        )
    bad = False
    for step in reversed(seen[0]):
        folder = step_folder(run, step)
        share = group.index, group.count
        found = group.together("restore/verify", lambda: validate_step(folder, hashes=True, share=share)[:20])  # noqa: B023
        problems = [problem for part in found for problem in part]
        if not problems:
            if bad:
                say(f"WARNING: going back to the checkpoint of step {step}")
            return step
        bad = True
        (aside, *_) = group.together(
            "restore/aside",
            lambda: set_aside(folder).name if group.first else None,  # noqa: B023
        )
        say(f"WARNING: checkpoint {step} is damaged and set aside as {aside}: {problems[0]}")
    if bad:
        say("WARNING: no good checkpoint is left; the run begins again at step 1")
    return None


def _everywhere(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])


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
    """float32 variables from `source`, on the host; a multi-token module it lacks is initialised from the seed."""
    want = flatten_paths(abstract_variables(cfg.model))
    leaves = {path: leaf for path, leaf in flatten_paths(source.load("float32")).items() if path in want}
    missing = [path for path in want if path not in leaves]
    if missing:

        def fresh(key: jax.Array) -> dict[str, jax.Array]:  # the rest of the model is never drawn
            values = flatten_paths(init_variables(cfg.model, key))
            return {path: values[path] for path in missing}

        leaves.update(jax.device_get(jax.jit(fresh)(jax.random.key(cfg.seed))))
    return {"params": {}, "router": {}, **unflatten_paths(leaves)}


def _is_mtp(path: str) -> bool:
    return path.split("/")[1] == "mtp"
