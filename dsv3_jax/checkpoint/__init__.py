"""Native checkpoints: Orbax arrays in chunks of one Hugging Face tensor, a manifest with checksums, one rename."""

from dsv3_jax.checkpoint.atomic import atomic_folder, remove_leftovers
from dsv3_jax.checkpoint.background import Background
from dsv3_jax.checkpoint.layout import kind_of
from dsv3_jax.checkpoint.manifest import Manifest, read_manifest
from dsv3_jax.checkpoint.native import (
    Loaded,
    latest_step,
    load_checkpoint,
    read_model_config,
    set_aside,
    step_folder,
    steps_of,
    validate_step,
)
from dsv3_jax.checkpoint.placement import load_tree
from dsv3_jax.checkpoint.saving import CheckpointSnapshot, save_checkpoint, snapshot_checkpoint
from dsv3_jax.checkpoint.snapshot import save_tree
from dsv3_jax.checkpoint.store import open_leaf

__all__ = [
    "Background",
    "CheckpointSnapshot",
    "Loaded",
    "Manifest",
    "atomic_folder",
    "kind_of",
    "latest_step",
    "load_checkpoint",
    "load_tree",
    "open_leaf",
    "read_manifest",
    "read_model_config",
    "remove_leftovers",
    "save_checkpoint",
    "save_tree",
    "set_aside",
    "snapshot_checkpoint",
    "step_folder",
    "steps_of",
    "validate_step",
]
