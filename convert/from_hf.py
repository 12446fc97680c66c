"""Hugging Face safetensors -> native checkpoint, tensor by tensor.

    python -m convert.from_hf SRC_DIR DST_DIR [--dtype keep|bfloat16|float32] [--force]

`keep` stores every tensor as it is and records it, so that `convert.to_hf` gives the same bytes back; FP8 weights stay
codes and scales. With another dtype they are dequantised (float32 arithmetic, rounded once). A killed
conversion goes on where it was when it is started again; DST_DIR appears when it is complete.
"""

from __future__ import annotations

import collections
import time
from pathlib import Path

from tyro.conf import Positional

from convert.common import SAFETENSORS_NAMES, Dtype, command, fingerprint, summary, tell, text_digest
from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.atomic import check_apart, on_disk
from dsv3_jax.checkpoint.jobs import Conversion, Job, check_early
from dsv3_jax.checkpoint.manifest import Manifest, read_manifest, write_manifest
from dsv3_jax.checkpoint.native import copy_files, tree_record, write_model_config
from dsv3_jax.checkpoint.quantized import Stored, begin, scale_dtypes, stored_arrays
from dsv3_jax.checkpoint.source import Source, open_source, travelling_files
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.plan import Dtypes, choose_dtypes
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import DTYPES


def convert(
    src: Path, dst: Path, dtype: Dtype = "keep", force: bool = False, *, quiet: bool = True
) -> Manifest:
    """Convert a Hugging Face folder to a native checkpoint.

    Raises:
      ConfigError: flags, config.json, or an existing `dst` without `force`.
      DataError: the folder's tensors do not fit its config; nothing is written.
      StorageError, OSError: disk full or failing; nothing is left behind.
    """
    from dsv3_jax.model import abstract_variables

    check_early(dst, force)
    if layout.kind_of(src) != "hf":
        if not src.is_dir():
            raise ConfigError(f"{src}: no such folder")
        raise ConfigError(f"{src}: config.json and safetensors expected: not a Hugging Face folder")
    check_apart(src, dst)
    started = time.monotonic()
    source = open_source(src, abstract_variables)
    dtypes = choose_dtypes(source.entries, source.tensors, SAFETENSORS_NAMES[dtype])
    if not quiet:
        tell(
            [*dict.fromkeys([*(n for n in source.notes if dtype == "keep" or "FP8" not in n), *dtypes.notes])]
        )
    tokenizer, files, _ = travelling_files(src)
    jobs = _jobs(source, dtypes)
    nbytes = sum(job.nbytes for job in jobs)
    plan = {
        "command": "from_hf",
        "dtype": dtype,
        "files": fingerprint([*(tensor.file for tensor in source.tensors.values()), *tokenizer, *files]),
        "config": text_digest((src / "config.json").read_text(encoding="utf-8")),
    }
    # Chunks in whole blocks, two lines of text for each, two small files a leaf.
    needed = sum(on_disk(job.nbytes) + 512 for job in jobs) + 8192 * (
        len(dtypes.leaves) + len(dtypes.formats)
    )
    with Conversion(dst, plan, force=force, nbytes=needed) as conversion:
        if conversion.already_done:
            return read_manifest(dst)
        arrays = _arrays(source, dtypes)
        begin(conversion, arrays)
        records = conversion.run(jobs, quiet=quiet)
        out = conversion.out
        write_model_config(out, source.cfg)
        copy_files(tokenizer, out / layout.TOKENIZER)
        copy_files([src / "config.json", *files], out / layout.HF)
        (out / layout.MANIFEST).unlink(missing_ok=True)  # of a run that was killed after writing it
        manifest = write_manifest(
            out,
            kind="weights",
            tree=tree_record(arrays),
            quantization=dtypes.formats,
            hf_dtypes=compact(source, dtypes),
            aliases=source.aliases,
            hashed={job.file: records[job.key] for job in jobs},
        )
        conversion.finish()
    if not quiet:
        print(summary(dst, len(jobs), nbytes, started))
    return manifest


def _arrays(source: Source, dtypes: Dtypes) -> dict[str, Stored]:
    scales = scale_dtypes(source.entries, source.tensors, dtypes.formats)
    leaves = flatten_paths(source.abstract)
    return stored_arrays(source.entries, leaves, dtypes.leaves, dtypes.formats, scales)


def _jobs(source: Source, dtypes: Dtypes) -> list[Job]:
    jobs = []
    for entry in source.entries:
        tensor, stored = source.tensors[entry.name], dtypes.leaves[entry.path]
        if entry.path in dtypes.formats:
            for part, info in tensor.parts.items():
                file = layout.chunk_file(f"{entry.path}/{part}", entry.index, len(info.shape))
                jobs.append(Job(file, file, 0, info.nbytes, lambda t=tensor, p=part: t.part_pieces(p)))  # type: ignore[misc]
            continue
        file = layout.chunk_file(entry.path, entry.index, len(entry.block_shape))
        nbytes = tensor.size * DTYPES[stored].itemsize
        jobs.append(Job(file, file, 0, nbytes, lambda t=tensor, d=stored: t.pieces(d)))  # type: ignore[misc]
    return jobs


def compact(source: Source, dtypes: Dtypes) -> dict[str, dict[str, str]]:
    """The manifest's hf_dtypes: the commonest dtype of each leaf, and the tensors that differ from it."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for entry in source.entries:
        counts[entry.path][dtypes.tensors[entry.name]] += 1
    leaves = {path: counter.most_common(1)[0][0] for path, counter in counts.items()}
    differing = {
        e.name: dtypes.tensors[e.name] for e in source.entries if dtypes.tensors[e.name] != leaves[e.path]
    }
    return {"leaves": leaves, "tensors": differing}


def main(src: Positional[Path], dst: Positional[Path], dtype: Dtype = "keep", force: bool = False) -> None:
    """Convert a Hugging Face folder to a native checkpoint.

    Args:
      src: folder with config.json and safetensors.
      dst: checkpoint folder to make.
      dtype: of the stored weights; keep leaves every tensor as it is, FP8 included. Router biases are never cast.
      force: replace DST if it is empty or a checkpoint.
    """
    convert(src, dst, dtype, force, quiet=False)


if __name__ == "__main__":
    command("from_hf", main)
