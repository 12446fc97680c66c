"""Compare a Hugging Face folder with what a checkpoint would export: names, shapes and bytes of every tensor.

    python -m convert.verify HF_DIR NATIVE_DIR [--cast]

Exit 0 when every tensor of HF_DIR is in NATIVE_DIR byte for byte (FP8 tensors: codes and scales, or, where
NATIVE_DIR holds them dequantised, the bytes of their values) and the other way round; exit 65 with the differences
otherwise. `--cast` also accepts tensors stored in another dtype, if they are the cast of HF_DIR's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tyro.conf import Positional

from convert.common import command, tell
from dsv3_jax.checkpoint.layout import kind_of
from dsv3_jax.checkpoint.source import Source, open_source
from dsv3_jax.errors import ConfigError, DataError
from dsv3_jax.hf.tensors import differing_part, first_difference

_SHOWN = 20


def differences(hf: Source, other: Source, *, cast: bool = False) -> list[str]:
    """What differs between two sources, one message for each tensor; [] when all bytes agree."""
    mine, theirs = _origins(hf), _origins(other)
    found = [f"{name}: only in {hf.folder}" for name in mine if name not in theirs]
    found += [f"{name}: only in {other.folder}" for name in theirs if name not in mine]

    def compare(name: str) -> str | None:
        a, b = hf.tensors[mine[name]], other.tensors[theirs[name]]
        if a.shape != b.shape:
            return f"{name}: shape {list(a.shape)} against {list(b.shape)}"
        if a.scale is not None and b.scale is not None and (a.fmt, a.dtype) == (b.fmt, b.dtype):
            part = differing_part(a, b)
            return None if part is None else f"{name}: {part} differ"
        dtype = hf.export_dtypes[mine[name]]
        stored = b.keep_dtype if b.scale is not None else other.export_dtypes[theirs[name]]
        if dtype != stored and not (cast or a.scale is not None):
            return f"{name}: {dtype} against {stored} (a cast; --cast compares its values)"
        at = first_difference(a, b, stored)
        return None if at is None else f"{name}: differs from element {at} on"

    with ThreadPoolExecutor(2) as pool:
        return found + [
            difference for difference in pool.map(compare, [n for n in mine if n in theirs]) if difference
        ]


def _origins(source: Source) -> dict[str, str]:
    """Every name an export has -> the name whose bytes it gets."""
    return {**{entry.name: entry.name for entry in source.entries}, **source.aliases}


def main(hf_dir: Positional[Path], native_dir: Positional[Path], cast: bool = False) -> None:
    """Compare a Hugging Face folder with a native checkpoint, tensor by tensor and byte by byte.

    Args:
      hf_dir: Hugging Face folder.
      native_dir: native checkpoint or training run (or another Hugging Face folder).
      cast: accept tensors stored in another dtype, if they are the cast of HF_DIR's.
    """
    from dsv3_jax.model import abstract_variables

    if kind_of(hf_dir) != "hf":
        raise ConfigError(f"{hf_dir}: config.json and safetensors expected: not a Hugging Face folder")
    hf, other = open_source(hf_dir, abstract_variables), open_source(native_dir, abstract_variables)
    tell([*hf.notes, *other.notes])
    found = differences(hf, other, cast=cast)
    if found:
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise DataError("\n  ".join([f"{len(found)} tensor(s) differ", *found[:_SHOWN], *more]))
    print(f"{len(_origins(hf)):,} tensors: names, shapes and bytes agree")


if __name__ == "__main__":
    command("verify", main)
