"""The strict set-up of every test: eight simulated CPU devices, no rank promotion, reproducible examples."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set up its devices")

REPO = Path(__file__).resolve().parent.parent
_DEVICES = "--xla_force_host_platform_device_count=8"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
# Compiled programs are kept between runs (and for the commands that tests start): the same machine code, so the
# same bits, in a third of the time. A folder per Python, since each has its own jax.
_COMPILED = REPO / ".cache" / f"compiled-for-tests-{sys.version_info[0]}.{sys.version_info[1]}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis  # noqa: E402 (pytest plugins may import jax: the environment comes first)
import pytest  # noqa: E402

from tests import compiled  # noqa: E402

compiled.whole_entries()

# Deadlines measure the compiler, not the code: the first example of a jitted function is always slow.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

_PARITY = REPO / "tests" / "parity"
_MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
collect_ignore = ["parity"] if _MISSING else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say plainly which part of the suite could not run here."""
    if _MISSING and _PARITY.is_dir():
        terminalreporter.write_line(
            f"NOT RUN: parity ({' and '.join(_MISSING)} not installed; `./run parity` installs them)"
        )


# Files of more than 30 CPU seconds with an empty compile cache, longest first: workers that take whole files begin with
# them, so none is left with one at the end.
_LONGEST = (
    "training/test_lora_run",
    "launch/test_many_processes",
    "inference/test_speculative",
    "training/test_trainer",
    "training/test_fp8",
    "model/test_paths",
    "sharded/test_dispatch",
    "inference/test_engine",
    "golden/test_golden",
    "inference/test_infer_command",
    "convert/test_quantize",
    "inference/test_engine_mesh",
    "sharded/test_dispatch_model",
    "quantization/test_model",
    "inference/test_batch",
    "convert/test_memory",
)
_PLACES = {REPO / "tests" / f"{name}.py": at for at, name in enumerate(_LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; everything under tests/parity/ carries the `parity` marker, said there or not."""
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))
    for item in items:
        if _PARITY in item.path.parents:
            item.add_marker(pytest.mark.parity)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file() -> Iterator[None]:
    """Programs of earlier files are dropped before their memory mappings run out."""
    yield
    compiled.drop_programs()
