"""One of several processes that save and restore a run together: `python -m tests.checkpoint.worker INDEX PORT FOLDER`.

Started by test_processes.py. Two devices a process; the values of every leaf follow from its path, so that each process
and the test can say what a leaf must hold without talking to each other.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import CheckpointConfig, MeshConfig, RunConfig
from dsv3_jax.errors import StorageError
from tests.training import tiny

COUNT, DEVICES = 2, 2
CFG: RunConfig = tiny.RUN


def value_of(path: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What the leaf at `path` holds."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return rng.integers(-1000, 1000, shape).astype(dtype)


def filled(state: Any) -> Any:
    """A state of shapes and shardings, filled by `value_of`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.make_array_from_callback(
            leaf.shape,
            leaf.sharding,
            lambda index: value_of(jax.tree_util.keystr(path), leaf.shape, leaf.dtype)[index],
        ),
        state,
    )


def same(have: Any, want: Any) -> bool:
    """Whether this process's shards are equal to the bit."""
    pairs = zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True)
    return all(
        a.sharding == b.sharding
        and all(
            np.asarray(x.data).tobytes() == np.asarray(y.data).tobytes()
            for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True)
        )
        for a, b in pairs
    )


def main(index: int, port: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a hang says where
    jax.distributed.initialize(f"127.0.0.1:{port}", COUNT, index)
    from dsv3_jax.checkpoint import step_folder, steps_of, store
    from dsv3_jax.parallel import make_mesh
    from dsv3_jax.training import restore
    from dsv3_jax.training.saving import Saver
    from dsv3_jax.training.step import abstract_state

    found: dict[str, Any] = {"devices": jax.device_count(), "local": jax.local_device_count()}
    said: list[str] = []
    cfg = tiny.replace(CFG, "checkpoint", keep=0)
    assert isinstance(cfg.checkpoint, CheckpointConfig)
    # Processes are the outer axis: D is cut between them, so that none holds a whole matrix.
    mesh = make_mesh(MeshConfig(1, 2, 2))
    state = filled(abstract_state(cfg, mesh))
    saver = Saver(folder, cfg, said.append)
    for step in (1, 2):
        saver.save(state, {"step": step}, before=lambda: None)
    saver.wait()
    found["steps"] = steps_of(folder)

    # A disk that is full for the second process only.
    if index == 1:
        real, left = os.pwrite, iter(range(10))

        def full(fd: int, data: Any, at: int) -> int:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data, at)

        store.os.pwrite = full  # type: ignore[attr-defined]
    try:
        saver.save(state, {"step": 3}, before=lambda: None)
        saver.wait()
    except (OSError, StorageError) as error:
        found["full"] = type(error).__name__
    store.os.pwrite = os.pwrite if index == 0 else real  # type: ignore[attr-defined]
    group = restore.processes()
    group.exchange("test/full", None)  # the first process has tidied up
    found["after"] = sorted(os.listdir(folder / "checkpoints"))

    # The newest step is damaged: both go back to the same one, here on another mesh.
    if index == 0:
        victim = max((step_folder(folder, 2) / "weights").rglob("c.*"), key=lambda path: path.stat().st_size)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    group.exchange("test/damaged", None)
    other = make_mesh(MeshConfig(2, 1, 2))
    restored = restore.restore_step(folder, cfg, other, said.append)
    assert restored is not None
    want = filled(abstract_state(cfg, other))
    found["restored"] = restored[1]["step"]
    found["same"] = same(
        (restored[0].params, restored[0].router, restored[0].opt_state, restored[0].guard),
        (want.params, want.router, want.opt_state, want.guard),
    )
    # Asked in one process: both stop after the same step.
    asked = False
    for step in range(1, 20):
        asked = asked or (index == 1 and step == 5)
        if group.stop_at(step, asked):
            found["stopped"] = step
            break
        group.exchange("test/step", None)
    found["said"] = said
    (folder / f"found-{index}.json").write_text(json.dumps(found))
    group.exchange("test/end", None)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
