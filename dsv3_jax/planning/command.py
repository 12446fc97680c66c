"""`train.py --dry-run`: its flags, the simulated devices, what is printed and written. JAX is imported last."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.cli import parse_run_config
from dsv3_jax.config import MESH_PRESETS, MeshConfig, RunConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.planning.hardware import hardware

USAGE = (
    "--dry-run [--devices N] [--hardware h100|h200|b200|a100] [--output FILE.html|FILE.svg|FILE.json]: "
    "plan the run on N simulated devices; nothing is trained, no accelerator is used"
)
_VALUES = ("--devices", "--hardware", "--output")
_COUNT = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Options:
    """Flags of a dry run beside those of the run.

    Attributes:
      devices: None for as many as the mesh keys ask for.
      output: a page (.html), its picture of the mesh alone (.svg), or the numbers (.json).
    """

    devices: int | None = None
    hardware: str = "h100"
    output: Path | None = None


def take_options(arguments: Sequence[str]) -> tuple[Options | None, list[str]]:
    """The flags of a dry run and the rest; None without --dry-run.

    Raises ConfigError naming a flag without its value or with a wrong one.
    """
    asked = [argument for argument in arguments if argument in ("--dry-run", "--dry_run")]
    if not asked:
        return None, list(arguments)
    values: dict[str, str] = {}
    rest, left = [], [argument for argument in arguments if argument not in asked]
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag not in _VALUES:
            rest.append(flag + equals + value)
            continue
        if not equals and not left:
            raise ConfigError(f"{flag} needs a value")
        values[flag.removeprefix("--")] = value if equals else left.pop(0)
    devices = values.get("devices")
    if devices is not None and (not devices.isdecimal() or int(devices) < 1):
        raise ConfigError(f"--devices is {devices!r}; expected a number of 1 or more")
    name = values.get("hardware", Options.hardware)
    hardware(name)
    output = Path(values["output"]) if "output" in values else None
    if output is not None and output.suffix not in (".html", ".svg", ".json"):
        raise ConfigError(f"--output is {str(output)!r}; expected a name that ends in .html, .svg or .json")
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output is {str(output)!r}; there is no folder {output.absolute().parent}")
    return Options(None if devices is None else int(devices), name, output), rest


def simulate(devices: int) -> None:
    """Make this process see `devices` CPU devices; JAX reads it when it starts.

    A process that has already imported JAX is started anew with the same arguments.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    have = re.search(rf"{_COUNT}=(\d+)", flags)
    if os.environ.get("JAX_PLATFORMS") == "cpu" and have and int(have[1]) >= devices:
        return
    kept = [flag for flag in flags.split() if not flag.startswith(_COUNT)]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"{_COUNT}={devices}"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def stated_devices(mesh: MeshConfig) -> int:
    """Devices that the mesh keys ask for; fsdp 0, "the rest", counts as 1."""
    if mesh.preset != "none":
        return math.prod(MESH_PRESETS[mesh.preset].values())
    return mesh.data * max(mesh.fsdp, 1) * mesh.expert * mesh.tensor


def dry_run(options: Options, arguments: Sequence[str]) -> int:
    """Plan the run of these arguments and print it; 0 whether it fits or not, for it is the plan that was asked for.

    Raises ConfigError (exit 2) for a wrong flag, and for mesh, devices or batch that do not fit together.
    """
    return plan_run(options, parse_run_config(arguments))


def plan_run(options: Options, cfg: RunConfig) -> int:
    """`dry_run` of a config."""
    devices = options.devices or stated_devices(cfg.mesh)
    simulate(devices)
    from dsv3_jax.planning import picture, show
    from dsv3_jax.planning.plan import make_plan, to_json

    plan = make_plan(cfg, devices, hardware(options.hardware))
    print(show.text(plan), flush=True)
    if options.output is not None:
        kind = options.output.suffix
        if kind == ".json":
            content = json.dumps(to_json(plan), indent=1) + "\n"
        else:
            content = picture.page(plan) if kind == ".html" else picture.mesh_svg(plan)
        options.output.write_text(content, encoding="utf-8")
        print(f"written: {options.output}")
    return 0
