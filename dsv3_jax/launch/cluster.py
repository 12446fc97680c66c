"""Which process of how many this is: from flags, Open MPI, MPICH, SLURM or a Kubernetes indexed job.

Read from the environment alone. Where JAX can find the coordinator by itself (SLURM, Open MPI 4, mpi4py, its
Kubernetes package) that is left to it; everywhere else the address must be given.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping

from dsv3_jax.config import DistributedConfig
from dsv3_jax.errors import ConfigError

Environment = Mapping[str, str]
_ADDRESS = "--distributed.coordinator_address HOST:PORT"
_FLAGS = ("coordinator_address", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a run.

    Attributes:
      source: where this was found, in words.
      index, count: process `index` of `count`; None: JAX asks the cluster.
      coordinator: host:port of process 0; None: JAX finds it.
      method: JAX's name of the cluster; "deactivate" where it has nothing to find, None lets it look.
      local_devices: the node's GPUs that are this process's; () takes all that it sees.
    """

    source: str
    index: int | None
    count: int | None
    coordinator: str | None = None
    method: str | None = "deactivate"
    local_devices: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def detect(cfg: DistributedConfig, environment: Environment) -> Member | None:
    """This process's place among many, or None when it is alone.

    Flags go before what the environment says, one by one.
    Raises ConfigError when they are incomplete or contradict each other, naming what was found and what was expected.
    """
    given = {name: getattr(cfg, name) for name in _FLAGS if getattr(cfg, name) is not None}
    if cfg.cluster == "none":
        if given:
            raise ConfigError(
                f"distributed.cluster is 'none', but distributed.{next(iter(given))} is given; expected one of the two"
            )
        return None
    found = _from_cluster(cfg.cluster, environment, asked=bool(given))
    if not given:
        if cfg.cluster == "flags":
            raise ConfigError(
                f"distributed.cluster is 'flags', but none is given; expected {_ADDRESS} and others"
            )
        return found if found is not None and found.count != 1 else None
    member = found or Member("flags", None, None)
    if "coordinator_address" in given:
        member = dataclasses.replace(member, coordinator=cfg.coordinator_address, method="deactivate")
    member = dataclasses.replace(
        member,
        index=given.get("process_id", member.index),
        count=given.get("num_processes", member.count),
        source="flags" if found is None else f"flags and {found.source}",
    )
    needed = {
        "coordinator_address": member.coordinator,
        "num_processes": member.count,
        "process_id": member.index,
    }
    if member.method != "deactivate":  # JAX finds the address
        del needed["coordinator_address"]
    lacking = [f"distributed.{name}" for name, value in needed.items() if value is None]
    if lacking:
        raise ConfigError(
            f"{', '.join(f'distributed.{name} = {value}' for name, value in given.items())} is given, but not "
            f"{' and '.join(lacking)}, and no cluster here tells; expected all three flags"
        )
    assert member.index is not None and member.count is not None
    if not 0 <= member.index < member.count:
        raise ConfigError(
            f"this is process {member.index} of {member.count} ({member.source}); expected 0 to {member.count - 1}"
        )
    return member if member.count > 1 else None


def _from_cluster(cluster: str, environment: Environment, *, asked: bool) -> Member | None:
    """What the environment tells. `asked`: flags are given, so that what is missing here may stand there."""
    finders = {"mpi": _mpi, "slurm": _slurm, "kubernetes": _kubernetes}
    if cluster == "flags":
        return None
    for name, finder in finders.items():
        if cluster in ("auto", name) and (found := finder(environment, asked)) is not None:
            return found
    if cluster != "auto":
        raise ConfigError(
            f"distributed.cluster is {cluster!r}, but none of its variables is set; {_EXPECTED[cluster]}"
        )
    return None


_EXPECTED = {
    "mpi": "expected a start by mpirun or mpiexec",
    "slurm": "expected a start by srun inside a job",
    "kubernetes": "expected a Job with completionMode: Indexed (it sets JOB_COMPLETION_INDEX)",
}


def _mpi(environment: Environment, asked: bool) -> Member | None:
    """Open MPI or MPICH's Hydra. Before SLURM: under `mpirun` in a SLURM job its variables are those of a daemon."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        source, prefix, method = "Open MPI", "OMPI_COMM_WORLD_", "ompi"
        names = (f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE")
        known = "OMPI_MCA_orte_hnp_uri" in environment  # set up to Open MPI 4
    elif {"PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"} <= environment.keys():
        source, method, known = "MPI", "", False
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    else:
        return None
    index, count, local_index, local_count = (_number(environment, name, source) for name in names)
    if not known and importlib.util.find_spec("mpi4py") is not None:
        method, known = "mpi4py", True
    if count > 1 and not known and not asked:
        raise ConfigError(
            f"{source} started {count} processes, but does not tell where process 0 is; expected {_ADDRESS} "
            "(or the package mpi4py)"
        )
    return Member(
        source,
        index,
        count,
        method=method if known else "deactivate",
        local_devices=_own_devices(environment, local_index, local_count, None),
    )


def _slurm(environment: Environment, asked: bool) -> Member | None:
    """A task of a SLURM job step."""
    if "SLURM_JOB_ID" not in environment:
        return None
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        tasks = environment.get("SLURM_NTASKS", "1")
        if tasks.isdecimal() and int(tasks) > 1 and not asked:
            raise ConfigError(
                f"this SLURM job has {tasks} tasks, but this process was not started by srun; expected "
                "`srun python train.py ...`, or --distributed.cluster none for one process"
            )
        return None
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    index, count, local_index = (_number(environment, name, "SLURM") for name in names)
    node = _number(environment, "SLURM_NODEID", "SLURM") if "SLURM_NODEID" in environment else 0
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_count = per_node[node] if node < len(per_node) else 1
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    return Member(
        "SLURM",
        index,
        count,
        method="slurm",
        local_devices=_own_devices(
            environment, local_index, local_count, int(on_node) if on_node.isdecimal() else None
        ),
    )


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1].

    >>> tasks_per_node("8(x2),4")
    [8, 8, 4]
    """
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}; expected a list such as '8(x2),4'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _kubernetes(environment: Environment, asked: bool) -> Member | None:
    """A pod of an indexed Job, which knows its number; the rest stands in flags, or JAX asks the cluster."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    index = _number(environment, "JOB_COMPLETION_INDEX", "Kubernetes")
    if asked:
        return Member("Kubernetes", index, None)
    if "KUBERNETES_SERVICE_HOST" in environment and importlib.util.find_spec("kubernetes") is not None:
        return Member("Kubernetes", index, None, method=None)
    raise ConfigError(
        f"this is pod {index} of an indexed job, which does not tell the pods' number and where pod 0 is; expected "
        f"{_ADDRESS} --distributed.num_processes N, or --distributed.cluster none for runs of one process"
    )


def _number(environment: Environment, name: str, source: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{source}: {name} is {text!r}; expected a number")
    return int(text)


def _own_devices(
    environment: Environment, local_index: int, local_count: int, on_node: int | None
) -> tuple[int, ...]:
    """The GPUs of one of `local_count` processes of a node: an equal share of those it sees.

    A process alone on its node takes all. So does one that sees fewer than the node has, or fewer than there are
    processes: its share was cut already.

    Args:
      on_node: GPUs of the job on this node, where that is known.
    """
    if local_count <= 1:
        return ()
    text = environment.get("CUDA_VISIBLE_DEVICES", "")
    visible = len([part for part in text.split(",") if part.strip()])
    if not visible:
        return (local_index,)  # JAX's own rule; without GPUs it means nothing
    if visible < local_count or (on_node is not None and visible < on_node):
        return ()
    if visible % local_count:
        raise ConfigError(
            f"{visible} GPUs are visible (CUDA_VISIBLE_DEVICES = {text}) to {local_count} processes of this node; "
            "expected a multiple"
        )
    share = visible // local_count
    return tuple(range(local_index * share, (local_index + 1) * share))
