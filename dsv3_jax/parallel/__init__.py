"""Meshes, the one table of sharding rules, and what the processes of a run tell each other."""

from dsv3_jax.parallel.feed import Feed, share_of
from dsv3_jax.parallel.first import barrier, compiled_by_all, first_then_all, from_first
from dsv3_jax.parallel.mesh import BATCH_AXES, MESH_AXES, make_mesh, mesh_shape
from dsv3_jax.parallel.processes import Processes, processes
from dsv3_jax.parallel.rules import axes_of, compute_spec, storage_spec

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "Feed",
    "Processes",
    "axes_of",
    "barrier",
    "compiled_by_all",
    "compute_spec",
    "first_then_all",
    "from_first",
    "make_mesh",
    "mesh_shape",
    "processes",
    "share_of",
    "storage_spec",
]
