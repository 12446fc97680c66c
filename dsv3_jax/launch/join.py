"""Joining the other processes through `jax.distributed`, and leaving them: together when done, at once on failure."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from dsv3_jax.config import DistributedConfig
from dsv3_jax.errors import LOST, ConfigError, tell
from dsv3_jax.launch.cluster import Member

# Words of a failed exchange in which this process took part, as gloo, NCCL and JAX's coordination service put it.
_LOST_WORDS = (
    "Gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset by peer",
    "coordination service",
    "CoordinationService",
    "unhealthy",
    "DEADLINE_EXCEEDED",
)


def lost_peer(error: BaseException) -> bool:
    """Whether an error most likely means that another process is gone."""
    import jax

    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in _LOST_WORDS)


@contextlib.contextmanager
def joined(member: Member | None, cfg: DistributedConfig) -> Iterator[None]:
    """Be one of many processes within the block; for None (alone) this does nothing.

    Must be entered before JAX sees its devices. Says in one line who this process is. When the block ends, the
    process waits for the others; when it fails, it says why and ends at once with the error's exit code, as the
    others would be waited for in vain.
    Raises ConfigError when the processes do not come together.
    """
    if member is None:
        yield
        return
    import jax

    _join(member, cfg)
    try:
        yield
        jax.distributed.shutdown()
    except (Exception, KeyboardInterrupt) as error:
        if lost_peer(error):
            first = str(error).strip().splitlines()[0]
            _leave(
                f"error: {member} lost another process ({first}). The one that stopped first says why; started "
                "again, the run goes on from its newest checkpoint.",
                LOST,
            )
        code = tell(error, who=f"{member}: ")
        if code is None:  # a bug
            traceback.print_exception(error)
            code = 1
        _leave("", code)


def _leave(text: str, code: int) -> NoReturn:
    """End without Python's clean-up, which would wait five minutes for the other processes."""
    import jax

    if text:
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(1.0)  # with it goes the coordination service: the others may end in their own words first
    os._exit(code)


def _join(member: Member, cfg: DistributedConfig) -> None:
    import jax

    _choose_collectives()
    # Its SIGTERM handler would replace the trainer's.
    jax.config.update("jax_enable_preemption_service", False)
    bind = None
    if member.coordinator is not None:
        host, _, port = member.coordinator.rpartition(":")
        if host in ("127.0.0.1", "localhost"):
            bind = f"127.0.0.1:{port}"  # JAX itself would listen on every network
        if member.index == 0:
            _check_port("127.0.0.1" if bind else "", int(port), member)
    try:
        jax.distributed.initialize(
            member.coordinator,
            member.count,
            member.index,
            local_device_ids=list(member.local_devices),  # []: all. None would mean one for each process
            cluster_detection_method=member.method,
            initialization_timeout=cfg.initialization_timeout_seconds,
            heartbeat_timeout_seconds=cfg.heartbeat_timeout_seconds,
            coordinator_bind_address=bind,
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = f" at {member.coordinator}" if member.coordinator else ""
        raise ConfigError(
            f"{member} ({member.source}) cannot join the others{where}: {error}; expected process 0 to be able to "
            "listen there and all others to reach it"
        ) from None
    index, count = jax.process_index(), jax.process_count()
    devices = ", ".join(map(str, jax.local_devices()))
    print(
        f"process {index} of {count} on {socket.gethostname()} ({member.source}): {devices} of {jax.device_count()} "
        "devices",
        flush=True,
    )


def _check_port(host: str, port: int, member: Member) -> None:
    """Raises ConfigError when process 0 cannot listen on its port: there JAX may fail by a segmentation fault."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{member} ({member.source}) cannot listen on port {port}: {error.strerror}; expected a port that is "
                "free on its host (distributed.coordinator_address)"
            ) from None


def _choose_collectives() -> None:
    """gloo between CPU devices of several processes: JAX's default cannot do without (GPUs use NCCL by themselves)."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
