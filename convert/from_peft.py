"""PEFT's files -> an adapter folder of ours.

    python -m convert.from_peft PEFT_DIR BASE_DIR DST_DIR [--force]

infer.py, the server and convert.merge read PEFT's files as they are; a folder of ours has checksums and knows its base.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from convert.common import command, tell
from dsv3_jax.checkpoint import save_checkpoint
from dsv3_jax.checkpoint.atomic import check_apart
from dsv3_jax.checkpoint.manifest import Manifest
from dsv3_jax.checkpoint.source import open_source
from dsv3_jax.errors import ConfigError


def convert(src: Path, base: Path, dst: Path, force: bool = False, *, quiet: bool = True) -> Manifest:
    """Read a PEFT folder and write it as ours.

    Raises:
      ConfigError: no PEFT folder, an option that is not supported, a base that does not fit, or an existing `dst`.
      DataError: files that are not whole.
    """
    from dsv3_jax.finetune import peft
    from dsv3_jax.finetune.base import fingerprint
    from dsv3_jax.finetune.files import open_adapter, record_of
    from dsv3_jax.model import abstract_variables

    if not (src / peft.CONFIG).is_file():
        raise ConfigError(f"{src}: no {peft.CONFIG}: not a PEFT folder")
    source = open_source(base, abstract_variables)
    found = open_adapter(src, source.cfg, source.abstract)
    found.check_model(source.abstract, source.folder)
    check_apart(src, dst)
    if not quiet:
        tell(found.notes)
    where = {
        "path": str(source.folder.absolute()),
        "sha256": fingerprint(source.folder),
        "rounded_to": "none",
    }
    record = record_of(found.lora, where)
    return save_checkpoint(dst, source.cfg, {**found.pairs, "router": {}}, adapter=record, force=force)


def main(src: Positional[Path], base: Positional[Path], dst: Positional[Path], force: bool = False) -> None:
    """Turn PEFT's files into an adapter of ours.

    Args:
      src: folder with adapter_config.json and adapter_model.safetensors.
      base: checkpoint that the adapter belongs to.
      dst: folder to make.
      force: replace DST if it is empty or a checkpoint.
    """
    convert(src, base, dst, force, quiet=False)


if __name__ == "__main__":
    command("from_peft", main)
