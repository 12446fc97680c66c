"""Quantise a checkpoint's weights, tensor by tensor: a native checkpoint a half, a quarter or an eighth the size.

    python -m convert.quantize SRC_DIR DST_DIR --method int4 --group-size 128 [--calibration FILE] [--skip PATTERN]

SRC_DIR is a native checkpoint, a training run or a Hugging Face folder. Without --calibration weights are rounded to
nearest; with it int4 and int8 go by GPTQ (arXiv 2210.17323): the rounding error of a column is made up for by the
columns after it, as far as the calibration text's activations tell; or, with --rounding awq (arXiv 2306.00978), columns
that large activations meet are scaled up first and norms, routers and rows before them scaled down, by powers of two.
Otherwise norms, biases, router, embedding and head stay as they are. DST_DIR/quantization.json has the sizes and the
error of every leaf; quantization.svg shows them.
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from convert.common import command, fingerprint, summary, tell, text_digest, write_companions
from dsv3_jax.checkpoint import layout
from dsv3_jax.checkpoint.atomic import check_apart, on_disk
from dsv3_jax.checkpoint.jobs import Conversion, Job, check_early
from dsv3_jax.checkpoint.manifest import Manifest, read_manifest, write_manifest
from dsv3_jax.checkpoint.native import tree_record
from dsv3_jax.checkpoint.quantized import Stored, begin, scale_dtypes, stored_arrays
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.rules import flatten_paths
from dsv3_jax.hf.safetensors import DTYPES
from dsv3_jax.quantization.choose import DEFAULT_KINDS, choose_formats
from dsv3_jax.quantization.formats import Format, parse_format
from dsv3_jax.quantization.report import measure, write_report
from dsv3_jax.quantization.streamed import quantized_pieces

if TYPE_CHECKING:
    from convert.calibrate import Calibrated

Kind = Literal["experts", "shared", "dense", "attention", "head"]


def convert(
    src: Path,
    dst: Path,
    method: Literal["fp8", "int8", "int4"] = "int4",
    group_size: int | None = None,
    asymmetric: bool = False,
    kinds: tuple[Kind, ...] = DEFAULT_KINDS,  # type: ignore[assignment]
    skip: tuple[str, ...] = (),
    calibration: Path | None = None,
    calibration_tokens: int = 16384,
    calibration_window: int = 512,
    rounding: Literal["gptq", "awq"] = "gptq",
    act_order: bool | None = None,
    force: bool = False,
    *,
    quiet: bool = True,
) -> Manifest:
    """Quantise the chosen leaves of a checkpoint.

    Raises:
      ConfigError: flags, no checkpoint at `src`, or an existing `dst` without `force`.
      DataError: the checkpoint is not whole, or a weight is not finite.
      StorageError, OSError: disk full or failing; nothing is left behind.
    """
    from dsv3_jax.model import abstract_variables

    fmt = _format(method, group_size, asymmetric)
    if act_order is not None and (calibration is None or rounding != "gptq"):
        raise ConfigError("--act-order goes with --calibration and --rounding gptq")
    check_early(dst, force)
    started = time.monotonic()
    source = open_source(src, abstract_variables)
    check_apart(source.folder, dst)
    columns = {entry.path: entry.hf_shape[-1] for entry in source.entries}
    formats, notes = choose_formats(columns, source.formats, fmt, kinds, skip)
    if not quiet:
        tell([*source.notes, *notes])
    calibrated = None
    if calibration is not None:
        if fmt.kind == "fp8":
            raise ConfigError("--calibration goes with int8 and int4; fp8 is rounded as DeepSeek releases it")
        from convert.calibrate import Calibrated

        calibrated = Calibrated(
            source,
            formats,
            calibration,
            calibration_tokens,
            calibration_window,
            rounding,
            act_order=act_order is not False,
            quiet=quiet,
        )
    elif rounding != "gptq":
        raise ConfigError(f"--rounding {rounding} needs --calibration")
    jobs = _jobs(source, formats, calibrated)
    nbytes = sum(job.nbytes for job in jobs)
    plan = {
        "command": "quantize",
        "formats": formats,
        "files": fingerprint(tensor.file for tensor in source.tensors.values()),
        "calibration": None if calibration is None else [text_digest(str(calibrated)), calibration_tokens],
    }
    needed = sum(on_disk(job.nbytes) + 512 for job in jobs) + 16384 * len(source.leaf_dtypes)
    with Conversion(dst, plan, force=force, nbytes=needed) as conversion:
        if conversion.already_done:
            return read_manifest(dst)
        arrays = _arrays(source, formats)
        begin(conversion, arrays)
        records = conversion.run(jobs, threads=1 if calibrated else None, quiet=quiet)
        out = conversion.out
        write_companions(out, source)
        report = measure(source, formats, out, rounding if calibrated else "nearest", calibrated)
        write_report(report, out)
        manifest = write_manifest(
            out,
            kind="weights",
            tree=tree_record(arrays),
            hf_dtypes={"leaves": dict(source.leaf_dtypes), "tensors": {}},
            aliases=source.aliases,
            hashed={job.file: records[job.key] for job in jobs},
            quantization=formats,
        )
        conversion.finish()
    if not quiet:
        print(report.table())
        print(summary(dst, len(jobs), nbytes, started))
    return manifest


def _format(method: str, group_size: int | None, asymmetric: bool) -> Format:
    if method == "fp8" and (group_size is not None or asymmetric):
        raise ConfigError("fp8 has blocks of 128 x 128: --group-size and --asymmetric go with int8 and int4")
    if asymmetric and method != "int4":
        raise ConfigError(f"--asymmetric goes with int4, not with {method}")
    if group_size is not None and (group_size < 16 or group_size % 2 or group_size > 4096):
        raise ConfigError(f"--group-size is {group_size}; an even number from 16 to 4096 expected")
    size = f":{group_size}" if group_size else ""
    return parse_format(f"{method}{'a' if asymmetric else ''}{size}")


def _arrays(source: Source, formats: dict[str, str]) -> dict[str, Stored]:
    kept = {path: fmt for path, fmt in formats.items() if source.formats.get(path) == fmt}
    scales = scale_dtypes(source.entries, source.tensors, kept)
    return stored_arrays(source.entries, flatten_paths(source.abstract), source.leaf_dtypes, formats, scales)


def _jobs(source: Source, formats: dict[str, str], calibrated: Calibrated | None) -> list[Job]:
    jobs = []
    for entry in source.entries if calibrated is None else calibrated.in_order(source.entries):
        tensor = source.tensors[entry.name]
        if entry.path not in formats:
            stored = source.leaf_dtypes[entry.path]
            file = layout.chunk_file(entry.path, entry.index, len(entry.block_shape))
            nbytes = tensor.size * DTYPES[stored].itemsize
            floats = partial(tensor.pieces, stored)
            if calibrated is not None and calibrated.changes(entry):
                floats = partial(calibrated.floats, entry, stored)
            jobs.append(Job(file, file, 0, nbytes, floats))
            continue
        fmt = parse_format(formats[entry.path])
        kept = source.formats.get(entry.path) == formats[entry.path]
        for part, (shape, dtype) in fmt.part_shapes(entry.hf_shape).items():
            file = layout.chunk_file(f"{entry.path}/{part}", entry.index, len(shape))
            if kept:
                nbytes, pieces = tensor.parts[part].nbytes, partial(tensor.part_pieces, part)
            else:
                nbytes = math.prod(shape) * dtype.itemsize
                pieces = partial(quantized_pieces, tensor, fmt, part)
                if calibrated is not None:
                    pieces = partial(calibrated.pieces, entry, part)
            jobs.append(Job(file, file, 0, nbytes, pieces))
    return jobs


def main(
    src: Positional[Path],
    dst: Positional[Path],
    method: Literal["fp8", "int8", "int4"] = "int4",
    group_size: int | None = None,
    asymmetric: bool = False,
    kinds: tuple[Kind, ...] = DEFAULT_KINDS,  # type: ignore[assignment]
    skip: tuple[str, ...] = (),
    calibration: Path | None = None,
    calibration_tokens: int = 16384,
    calibration_window: int = 512,
    rounding: Literal["gptq", "awq"] = "gptq",
    act_order: bool | None = None,
    force: bool = False,
) -> None:
    """Quantise a checkpoint's weights into a native checkpoint.

    Args:
      src: native checkpoint, training run folder (its newest valid step), or Hugging Face folder.
      dst: checkpoint folder to make.
      method: fp8 (e4m3, 128 x 128 blocks), int8, or int4.
      group_size: columns that share a scale; by default 128 for int4 and the whole row for int8.
      asymmetric: int4 with a zero point for each group.
      kinds: which weights: experts, shared, dense, attention, head.
      skip: leaves that stay as they are, by shell patterns of their paths, such as "*kv_b*".
      calibration: text file; weights are then rounded by what our own model's activations on it tell.
      calibration_tokens: how many of its tokens are used.
      calibration_window: tokens that are read in one go, at most; no more than the model was trained on.
      rounding: with a calibration, gptq, or awq: columns scaled before they are rounded, norms to match.
      act_order: gptq rounds the columns that large activations meet first (True, the default) or as they come.
      force: replace DST if it is empty or a checkpoint.
    """
    convert(
        src,
        dst,
        method,
        group_size,
        asymmetric,
        kinds,
        skip,
        calibration,
        calibration_tokens,
        calibration_window,
        rounding,
        act_order,
        force,
        quiet=False,
    )


if __name__ == "__main__":
    command("quantize", main)
