"""The order of the layers, kept: nothing imports upward, nothing imports torch, no file outgrows a reader."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# Lowest first. A module may import its own row and every row above it in this list, never one below.
LAYERS: list[set[str]] = [
    {"dsv3_jax.errors", "dsv3_jax.hardware", "dsv3_jax.config"},
    {"dsv3_jax.kernels", "dsv3_jax.launch"},
    {"dsv3_jax.parallel"},
    {
        "dsv3_jax.text",
        "dsv3_jax.hf",
        "dsv3_jax.checkpoint",
        "dsv3_jax.quantization",
        "dsv3_jax.cli",
        "dsv3_jax.infer_flags",
    },
    {"dsv3_jax.model"},
    {"dsv3_jax.inference", "dsv3_jax.finetune"},
    {"dsv3_jax.training"},
    {"dsv3_jax.serving", "dsv3_jax.evaluation"},
    {"dsv3_jax.planning"},
    {"train", "infer", "convert", "dsv3_jax.describe", "dsv3_jax.demo"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
OWN_PACKAGES = {"dsv3_jax", "convert", "train", "infer"}
FORBIDDEN = {"torch", "transformers"}
MAX_LINES = 450


def source_files() -> list[Path]:
    files = [*REPO.glob("dsv3_jax/**/*.py"), *REPO.glob("convert/**/*.py")]
    files += [path for name in ("train.py", "infer.py") if (path := REPO / name).is_file()]
    return sorted(files)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(REPO).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> int | None:
    """The row a module belongs to, or None where it is a package's bare root or somebody else's."""
    while module:
        if module in RANK:
            return RANK[module]
        module = module.rpartition(".")[0]
    return None


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Every absolute module a source file imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *([base] if base else [])])
            # `from dsv3_jax import model` imports a module, `from dsv3_jax.model import f` a name of one:
            # the longest prefix that has a layer decides, so both may be listed.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def problems(source: str, module: str, is_package: bool = False) -> list[str]:
    own = layer_of(module)
    bare_root = module in OWN_PACKAGES and is_package
    messages = []
    if own is None and not bare_root:
        messages.append(f"{module} has no layer: place it in LAYERS (tests/test_layering.py)")
    for name in sorted(imported_modules(source, module, is_package)):
        if name.partition(".")[0] in FORBIDDEN:
            messages.append(f"{module} imports {name}: only tests/parity and benchmarks may")
        target = layer_of(name) if name.partition(".")[0] in OWN_PACKAGES else None
        if target is not None and target > (-1 if own is None else own):
            messages.append(f"{module} (layer {own}) imports {name} (layer {target})")
    return messages


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(REPO)))
def test_imports_go_down_and_files_stay_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert problems(source, module_name(path), path.name == "__init__.py") == []
    lines = source.count("\n") + 1
    assert lines <= MAX_LINES, f"{lines} lines; split it (the aim is 200, the limit {MAX_LINES})"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsv3_jax.hf.rules", "from dsv3_jax.model import abstract_variables"),
        ("dsv3_jax.hf.rules", "from dsv3_jax import model"),
        ("dsv3_jax.hf.rules", "from ..model import abstract_variables"),
        ("dsv3_jax.hf.rules", "def f():\n    import dsv3_jax.training.loop"),
        ("dsv3_jax.model.block", "from convert import from_hf"),
        ("dsv3_jax.training.loop", "import train"),
        ("convert.to_hf", "import torch.nn"),
        ("infer", "from transformers import AutoModel"),
        ("dsv3_jax.novelty", "import os"),
    ],
)
def test_the_check_sees_a_breach(module: str, source: str) -> None:
    assert len(problems(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dsv3_jax.model.block", "from dsv3_jax.hf.rules import Rule\nfrom . import norm\nimport jax"),
        ("dsv3_jax.checkpoint.save", "from dsv3_jax.hf import safetensors"),
        ("train", "from dsv3_jax.training import loop"),
    ],
)
def test_the_check_allows_what_goes_down(module: str, source: str) -> None:
    assert problems(source, module) == []
