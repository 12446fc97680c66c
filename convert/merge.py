"""Base and adapter -> one native checkpoint, tensor by tensor.

    python -m convert.merge BASE_DIR ADAPTER_DIR DST_DIR [--dtype keep|bfloat16|float32] [--force]

W + scale * b a is added up in float32 and rounded once. `keep` gives every weight the dtype that it is stored in;
weights that are stored quantised are dequantised, to bfloat16 under `keep` (quantise the result again if it is to be
small). ADAPTER_DIR is a LoRA run (its newest valid step), one of its steps, or a PEFT folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from convert.common import SAFETENSORS_NAMES, Dtype, command, fingerprint, summary, tell, write_companions
from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.atomic import check_apart, on_disk
from dsv3_jax.checkpoint.jobs import Conversion, Job, check_early
from dsv3_jax.checkpoint.manifest import Manifest, read_manifest, write_manifest
from dsv3_jax.checkpoint.native import tree_record
from dsv3_jax.checkpoint.quantized import begin, stored_arrays
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.hf.plan import is_router
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import DTYPES
from dsv3_jax.hf.tensors import StoredTensor, cast


def convert(
    base: Path, adapter: Path, dst: Path, dtype: Dtype = "keep", force: bool = False, *, quiet: bool = True
) -> Manifest:
    """Merge an adapter into its base.

    Raises:
      ConfigError: flags, no checkpoint or adapter, two that do not fit, or an existing `dst` without `force`.
      DataError: a checkpoint or adapter that is not whole.
      StorageError, OSError: disk full or failing; nothing is left behind.
    """
    from dsv3_jax.finetune.files import open_adapter
    from dsv3_jax.finetune.peft import factors_of
    from dsv3_jax.model import abstract_variables

    check_early(dst, force)
    started = time.monotonic()
    source = open_source(base, abstract_variables)
    found = open_adapter(adapter, source.cfg, source.abstract)
    notes = found.check_model(source.abstract, source.folder)
    check_apart(source.folder, dst)
    check_apart(found.folder, dst)
    if source.formats:
        notes.append(f"{len(source.formats)} quantised leaves are dequantised")
    if not quiet:
        tell([*source.notes, *found.notes, *notes])
    asked = SAFETENSORS_NAMES[dtype]
    dtypes = {
        path: stored if asked == "keep" else "F32" if is_router(path) else asked
        for path, stored in source.leaf_dtypes.items()
    }
    flat = flatten_paths(found.pairs)
    jobs = []
    for entry in source.entries:
        tensor, kind = source.tensors[entry.name], dtypes[entry.path]
        pieces = partial(tensor.pieces, kind)
        if entry.path in found.lora.paths:
            a, b = factors_of(found.lora, flat, entry)
            pieces = partial(merged_pieces, tensor, a, b, found.lora.scale, kind)
        file = layout.chunk_file(entry.path, entry.index, len(entry.block_shape))
        jobs.append(Job(file, file, 0, tensor.size * DTYPES[kind].itemsize, pieces))
    nbytes = sum(job.nbytes for job in jobs)
    plan = {
        "command": "merge",
        "dtypes": dtypes,
        "files": fingerprint(tensor.file for tensor in source.tensors.values()),
        "adapter": fingerprint(file for file in found.folder.rglob("*") if file.is_file()),
    }
    needed = sum(on_disk(job.nbytes) + 512 for job in jobs) + 16384 * len(dtypes)
    with Conversion(dst, plan, force=force, nbytes=needed) as conversion:
        if conversion.already_done:
            return read_manifest(dst)
        arrays = stored_arrays(source.entries, flatten_paths(source.abstract), dtypes, {})
        begin(conversion, arrays)
        records = conversion.run(jobs, quiet=quiet)
        out = conversion.out
        write_companions(out, source)
        manifest = write_manifest(
            out,
            kind="weights",
            tree=tree_record(arrays),
            hf_dtypes={"leaves": dtypes, "tensors": {}},
            aliases=source.aliases,
            hashed={job.file: records[job.key] for job in jobs},
        )
        conversion.finish()
    if not quiet:
        print(summary(dst, len(jobs), nbytes, started))
    return manifest


def merged_pieces(
    tensor: StoredTensor, a: np.ndarray, b: np.ndarray, scale: float, dtype: str
) -> Iterator[np.ndarray]:
    """The elements of W + scale * b a in order, added up in float32: some rows' worth of b a at a time."""
    columns, done = a.shape[1], 0
    for piece in tensor.pieces("F32"):
        first, stop = done // columns, -(-(done + piece.size) // columns)
        delta = (np.float32(scale) * (b[first:stop] @ a)).reshape(-1)
        start = done - first * columns
        yield cast(piece + delta[start : start + piece.size], dtype)
        done += piece.size


def main(
    base: Positional[Path],
    adapter: Positional[Path],
    dst: Positional[Path],
    dtype: Dtype = "keep",
    force: bool = False,
) -> None:
    """Add an adapter up with its base.

    Args:
      base: native checkpoint, training run folder (its newest valid step), or Hugging Face folder.
      adapter: LoRA run, one of its steps, or PEFT folder.
      dst: native checkpoint to make.
      dtype: of all weights; keep: as they are stored, bfloat16 for what is quantised.
      force: replace DST if it is empty or a checkpoint.
    """
    convert(base, adapter, dst, dtype, force, quiet=False)


if __name__ == "__main__":
    command("merge", main)
