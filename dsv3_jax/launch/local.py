"""What to start: N processes of a run on this machine, or the one that this process will watch over."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from dsv3_jax.errors import ConfigError
from dsv3_jax.launch.cluster import Member

SUPERVISED = "DSV3_SUPERVISED"  # set for a process that another one watches over: that one's process id
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclasses.dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
      name: how messages call it.
      label: put before each line it prints; "" leaves them as they are.
    """

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    label: str = ""


def take_launch(arguments: Sequence[str]) -> tuple[list[str], int | None]:
    """The arguments without --launch, and its number of processes (None: it is not given).

    Raises ConfigError for anything but `local:N`.
    """
    rest: list[str] = []
    value = None
    waiting = False
    for argument in arguments:
        if waiting:
            value, waiting = argument, False
        elif argument == "--launch":
            waiting = True
        elif argument.startswith("--launch="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    if waiting:
        raise ConfigError("--launch needs a value; expected local:N")
    if value is None:
        return rest, None
    kind, _, count = value.partition(":")
    if kind != "local" or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"--launch is {value!r}; expected local:N, N processes on this machine")
    return rest, int(count)


def local_commands(
    script: str, arguments: Sequence[str], count: int, environment: Mapping[str, str]
) -> list[Command]:
    """The commands of `count` processes on this machine, which find each other on a free port of its loopback.

    Each gets an equal share of the visible GPUs. Devices simulated on the CPU are per process, as XLA_FLAGS says.
    Raises ConfigError when the GPUs cannot be shared equally.
    """
    address = f"127.0.0.1:{free_port()}"
    gpus = visible_gpus(environment)
    if len(gpus) % count:
        raise ConfigError(
            f"--launch local:{count}: {len(gpus)} GPUs are visible; expected a number of processes that divides them"
        )
    share = len(gpus) // count
    commands = []
    for index in range(count):
        place = {
            "cluster": "flags",
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
        }
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * share : (index + 1) * share])} if gpus else {}
        commands.append(
            Command(
                name=f"process {index}",
                arguments=(
                    sys.executable,
                    script,
                    *arguments,
                    *(f"--distributed.{key}={value}" for key, value in place.items()),
                ),
                environment={**environment, **own, SUPERVISED: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
                label=f"[{index}] ",
            )
        )
    return commands


def supervised_command(
    script: str, arguments: Sequence[str], member: Member, environment: Mapping[str, str]
) -> Command:
    """The command of this process itself, to be watched by it.

    JAX aborts a process whose peer is lost; only a second process can still say in plain words what happened.
    """
    return Command(
        name=str(member),
        arguments=(sys.executable, script, *arguments),
        environment={**environment, SUPERVISED: str(os.getpid())},
    )


def follow_parent() -> None:
    """In a watched process: get SIGTERM (save and end) when the watching process dies. Elsewhere nothing."""
    parent = os.environ.get(SUPERVISED)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)
    if str(os.getppid()) != parent:  # it died before that
        os.kill(os.getpid(), signal.SIGTERM)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The NVIDIA GPUs that a process started here would use, as CUDA_VISIBLE_DEVICES names them; [] on CPU."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [part.strip() for part in listed.split(",") if part.strip() not in ("", "-1")]
    tool = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    if tool is None:
        return []
    told = subprocess.run(
        [tool, "--list-gpus"], capture_output=True, text=True, check=False, env=dict(environment)
    )
    return [str(number) for number, _ in enumerate(told.stdout.splitlines())] if told.returncode == 0 else []
