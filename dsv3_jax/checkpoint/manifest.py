"""manifest.json: what a checkpoint consists of, byte for byte. A folder without a valid one is no checkpoint.

Orbax has no data checksum (a flipped bit restores as another weight), so every file has its SHA-256 here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dsv3_jax
from dsv3_jax.checkpoint.layout import MANIFEST, MODEL
from dsv3_jax.errors import DataError
from dsv3_jax.hf.safetensors import parse_json, read_range

FORMAT = "dsv3_jax/1"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      kind: "weights", "training" or "adapter" (pairs, and training's state if there is any).
      step: the training step, if there is one.
      files: relative path -> {"size", "sha256"} of every file but the manifest.
      tree: leaf path of the weights -> {"shape", "dtype"}.
      hf_dtypes: {"leaves": {leaf path: dtype}, "tensors": {HF name: dtype}}: the safetensors dtype an export gives
        back, by leaf, and by name where a tensor differs from its leaf.
      aliases: HF names that are copies of another HF name.
      quantization: leaf path -> format of its codes, for leaves whose parts are stored (`checkpoint.quantized`).
      config_sha256: of model.yaml.
      versions: of the libraries that wrote it.
      checksum: SHA-256 of all the rest of the document; "" in checkpoints made before there was one.
    """

    kind: str
    step: int | None
    files: dict[str, dict[str, Any]]
    tree: dict[str, dict[str, Any]]
    hf_dtypes: dict[str, dict[str, str]]
    aliases: dict[str, str]
    config_sha256: str
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT
    checksum: str = ""
    quantization: dict[str, str] = field(default_factory=dict)

    def export_dtype(self, name: str, path: str) -> str:
        """The dtype in which an export writes the HF tensor `name`, a slice of leaf `path`."""
        return self.hf_dtypes["tensors"].get(name) or self.hf_dtypes["leaves"][path]


def versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint, for whoever has to read it later."""
    names = ("jax", "orbax-checkpoint", "tensorstore", "numpy")
    return {
        "dsv3_jax": dsv3_jax.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    for piece in read_range(file, 0, file.stat().st_size):
        digest.update(piece)
    return digest.hexdigest()


def file_record(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"size": file.stat().st_size, "sha256": sha256_file(file)}


def write_manifest(
    folder: Path,
    *,
    kind: str,
    tree: Mapping[str, dict[str, Any]],
    hf_dtypes: Mapping[str, Mapping[str, str]],
    aliases: Mapping[str, str],
    step: int | None = None,
    hashed: Mapping[str, dict[str, Any]] | None = None,
    quantization: Mapping[str, str] | None = None,
) -> Manifest:
    """Write `folder`/manifest.json, last of all files.

    Args:
      hashed: records of files whose SHA-256 is known from writing them; every other file is read.
    """
    hashed = hashed or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert MANIFEST not in names, folder
    manifest = Manifest(
        kind=kind,
        step=step,
        files={name: dict(hashed[name]) if name in hashed else file_record(folder / name) for name in names},
        tree=dict(tree),
        hf_dtypes={key: dict(value) for key, value in hf_dtypes.items()},
        aliases=dict(aliases),
        config_sha256=sha256_file(folder / MODEL),
        versions=versions(),
        quantization=dict(quantization or {}),
    )
    manifest = replace(manifest, checksum=_checksum(asdict(manifest)))
    first = {"format": manifest.format}
    (folder / MANIFEST).write_text(
        json.dumps({**first, **asdict(manifest)}, indent=1) + "\n", encoding="utf-8"
    )
    return manifest


def _checksum(document: Mapping[str, Any]) -> str:
    """Of a manifest's content, whatever its layout as text: nothing else vouches for what is not a file's checksum."""
    rest = {key: value for key, value in document.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a checkpoint folder. Raises DataError when there is none or it is not valid."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise DataError(f"{folder}: no {MANIFEST}: not a complete checkpoint")
    document = parse_json(file.read_bytes(), str(file))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise DataError(f"{file}: format {found!r}, {FORMAT!r} expected")
    try:
        manifest = Manifest(**document)
    except TypeError as error:
        raise DataError(f"{file}: {error}") from error
    for name, record in manifest.files.items():
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts or not {"size", "sha256"} <= set(record):
            raise DataError(f"{file}: files[{name!r}] is not a file of this folder with size and sha256")
    if not {"leaves", "tensors"} <= set(manifest.hf_dtypes):
        raise DataError(f"{file}: hf_dtypes must hold leaves and tensors")
    if "checksum" in document and manifest.checksum != _checksum(document):
        raise DataError(f"{file}: its checksum differs: the content has changed")
    return manifest


def problems_of(
    folder: Path | str,
    *,
    hashes: bool = False,
    share: tuple[int, int] = (0, 1),
    only: Callable[[str], bool] = lambda name: True,
    threads: int = 4,
) -> list[str]:
    """What is wrong with a checkpoint folder, one message each; [] when it is whole.

    Args:
      hashes: also read every byte and compare the SHA-256 (about 1.5 GB/s a core).
      only: which files, by their names in the manifest.
      share: (i, n) looks at every n-th file from the i-th on, for n processes that share the work.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, record = item
        file = folder / name
        if not file.is_file():
            return f"{file}: missing"
        size = file.stat().st_size
        if size != record["size"]:
            return f"{file}: {size} bytes, {record['size']} expected"
        if hashes and sha256_file(file) != record["sha256"]:
            return f"{file}: SHA-256 differs from the manifest's: the content has changed"
        return None

    with ThreadPoolExecutor(threads) as pool:
        chosen = [item for item in manifest.files.items() if only(item[0])]
        mine = itertools.islice(chosen, share[0], None, share[1])
        found = [problem for problem in pool.map(check, mine) if problem]
    if MODEL not in manifest.files or manifest.files[MODEL]["sha256"] != manifest.config_sha256:
        found.append(f"{folder / MANIFEST}: config_sha256 is not that of {MODEL}")
    return found
