"""A LoRA run or adapter of ours -> PEFT's files, which `peft` opens beside transformers' DeepseekV3.

    python -m convert.to_peft ADAPTER_DIR DST_DIR [--base DIR] [--dtype float32|bfloat16] [--force]

DST_DIR gets adapter_config.json and adapter_model.safetensors. The base is looked up where the adapter was trained on
it unless --base says where it is now; only its config is read. Pairs of the multi-token module are left out with a
note: transformers does not have it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

from convert.common import SAFETENSORS_NAMES, command, tell
from dsv3_jax.checkpoint.atomic import atomic_folder, check_apart
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.errors import ConfigError
from dsv3_jax.hf.tensors import cast
from dsv3_jax.hf.writer import plan_shards, write_headers
from dsv3_jax.quantization.choose import kind_of_leaf


def convert(
    adapter: Path,
    dst: Path,
    base: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    force: bool = False,
    *,
    quiet: bool = True,
) -> dict[str, np.ndarray]:
    """Write PEFT's two files; the tensors by name.

    Raises:
      ConfigError: no adapter or base, two that do not fit, or an existing `dst` without `force`.
      DataError: an adapter that is not whole.
    """
    from dsv3_jax.finetune import peft
    from dsv3_jax.finetune.files import base_of, open_adapter
    from dsv3_jax.model import abstract_variables

    source = open_source(base or base_of(adapter), abstract_variables)
    found = open_adapter(adapter, source.cfg, source.abstract)
    notes = [*found.notes, *found.check_model(source.abstract, source.folder)]
    trunk = found.without_module()
    left = len(found.lora.paths) - len(trunk.lora.paths)
    if left:
        notes.append(f"{left} leaves of the multi-token module are left out: transformers has no such module")
    if not trunk.lora.paths:
        raise ConfigError(f"{adapter}: nothing but pairs of the multi-token module")
    if any(kind_of_leaf(path) in ("dense", "shared") for path in trunk.lora.paths):
        notes.append(
            "pairs of dense and shared layers have their modules' names, which peft 0.21 with transformers 5 takes for "
            "the experts': other readers open them, or merge (python -m convert.merge)"
        )
    check_apart(found.folder, dst)
    kind = SAFETENSORS_NAMES[dtype]
    tensors, keys = peft.tensors_of(trunk.lora, trunk.pairs, source.cfg, source.abstract)
    tensors = {name: cast(np.ascontiguousarray(value), kind) for name, value in tensors.items()}
    shards = plan_shards([(name, kind, value.shape) for name, value in tensors.items()], 1 << 62)
    with atomic_folder(dst, force=force) as folder:
        write_headers(folder, shards)
        for name, place in shards.places.items():
            with (folder / place.file).open("r+b") as stream:
                stream.seek(place.offset)
                stream.write(tensors[name].tobytes())
        (file,) = shards.headers
        (folder / file).rename(folder / peft.WEIGHTS)
        text = json.dumps(peft.config_of(trunk.lora, keys, str(source.folder)), indent=2, sort_keys=True)
        (folder / peft.CONFIG).write_text(text + "\n", encoding="utf-8")
    if not quiet:
        tell(notes)
        print(f"{dst}: {len(tensors)} tensors, {shards.nbytes / 1e6:.1f} MB")
    return tensors


def main(
    adapter: Positional[Path],
    dst: Positional[Path],
    base: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    force: bool = False,
) -> None:
    """Write an adapter as PEFT's files.

    Args:
      adapter: LoRA run (its newest valid step), or one of its steps.
      dst: folder to make.
      base: checkpoint that the adapter belongs to; by default where it was trained on it.
      dtype: of the tensors.
      force: replace DST if it is an empty folder.
    """
    convert(adapter, dst, base, dtype, force, quiet=False)


if __name__ == "__main__":
    command("to_peft", main)
