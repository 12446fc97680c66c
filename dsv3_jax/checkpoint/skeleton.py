"""The skeleton of a checkpoint, made by a process of its own: see `store._save_elements_alone`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from dsv3_jax.checkpoint.store import save_elements
from dsv3_jax.hf.rules import unflatten_paths

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    shapes = {path: jax.ShapeDtypeStruct((), name) for path, name in asked["dtypes"].items()}
    save_elements(Path(sys.argv[1]), unflatten_paths(shapes) | asked["empty"])
