"""Which process of how many this is, as flags and the environments of MPI, SLURM and Kubernetes tell it."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from dsv3_jax.config import DistributedConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.launch import Member, detect
from dsv3_jax.launch.cluster import tasks_per_node

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[3-6]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}


def found(environment: dict[str, str], **flags: Any) -> Member | None:
    return detect(DistributedConfig(**flags), environment)


@pytest.fixture(autouse=True)
def _no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without mpi4py and kubernetes, whatever is installed here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_process_without_a_cluster_is_alone() -> None:
    assert found({"HOME": "/root"}) is None
    assert found({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None  # an interactive shell
    assert found(SLURM, cluster="none") is None
    assert found({}, coordinator_address="a:1", num_processes=1, process_id=0) is None


def test_flags_say_all_three() -> None:
    member = found({}, coordinator_address="node1:5557", num_processes=4, process_id=3)
    assert member == Member("flags", 3, 4, "node1:5557", "deactivate", ())
    assert str(member) == "process 3 of 4"


def test_flags_go_before_the_environment_one_by_one() -> None:
    member = found(SLURM, coordinator_address="node9:1")
    assert member == Member("flags and SLURM", 2, 4, "node9:1", "deactivate", ())
    # Started by --launch within a job: the job's own numbers mean nothing.
    member = found(SLURM, cluster="flags", coordinator_address="a:1", num_processes=2, process_id=1)
    assert member == Member("flags", 1, 2, "a:1", "deactivate", ())


def test_slurm_leaves_the_address_to_jax_and_gives_a_process_alone_on_its_node_all_gpus() -> None:
    assert found(SLURM) == Member("SLURM", 2, 4, None, "slurm", ())


@pytest.mark.parametrize(
    ("visible", "on_node", "own"),
    [
        ("0,1,2,3", "4", (2, 3)),  # all see all: an equal share
        ("0,1", "4", ()),  # each sees its own two: all of them
        ("0", None, ()),  # bound one by one
        ("", None, (1,)),  # not known: one each, as JAX does
    ],
)
def test_processes_of_one_node_share_its_gpus(
    visible: str, on_node: str | None, own: tuple[int, ...]
) -> None:
    environment = {
        **SLURM,
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1,2",
        "CUDA_VISIBLE_DEVICES": visible,
    }
    member = found(environment | ({"SLURM_GPUS_ON_NODE": on_node} if on_node else {}))
    assert member is not None and member.local_devices == own


def test_gpus_that_cannot_be_shared_are_refused() -> None:
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x4)", "CUDA_VISIBLE_DEVICES": "0,1,2"}
    with pytest.raises(
        ConfigError, match=r"3 GPUs are visible .* to 2 processes of this node; expected a multiple"
    ):
        found(environment)


def test_slurm_without_srun_is_said() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    with pytest.raises(ConfigError, match=r"job has 16 tasks, .* not started by srun; expected `srun python"):
        found(batch)
    assert found({**batch, "SLURM_NTASKS": "1"}) is None


def test_open_mpi_before_slurm_whose_variables_are_those_of_a_daemon() -> None:
    with_uri = {**SLURM, **OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
    assert found(with_uri) == Member("Open MPI", 5, 8, None, "ompi", (1,))
    with pytest.raises(
        ConfigError, match=r"Open MPI started 8 processes, .*expected --distributed\.coordinator"
    ):
        found(OPEN_MPI)  # version 5 does not tell the address
    assert found(OPEN_MPI, coordinator_address="a:1") == Member(
        "flags and Open MPI", 5, 8, "a:1", "deactivate", (1,)
    )


def test_mpich_and_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(MPICH, coordinator_address="a:1") == Member("flags and MPI", 1, 2, "a:1", "deactivate", ())
    with pytest.raises(ConfigError, match="MPI started 2 processes"):
        found(MPICH)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "mpi4py" else None)
    assert found(MPICH) == Member("MPI", 1, 2, None, "mpi4py", ())


def test_a_pod_of_an_indexed_job_knows_its_number() -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    member = found(pod, coordinator_address="dsv3-0.dsv3:5557", num_processes=8)
    assert member == Member("flags and Kubernetes", 3, 8, "dsv3-0.dsv3:5557", "deactivate", ())
    with pytest.raises(
        ConfigError, match=r"pod 3 of an indexed job, .*expected --distributed\.coordinator_address"
    ):
        found(pod)
    assert found({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # some other pod


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (
            {},
            {"num_processes": 2},
            r"num_processes = 2 is given, but not distributed\.coordinator_address and ",
        ),
        (
            {},
            {"cluster": "slurm"},
            "distributed.cluster is 'slurm', but none of its variables is set; expected a start",
        ),
        ({}, {"cluster": "flags"}, "but none is given"),
        ({}, {"cluster": "none", "process_id": 0}, "cluster is 'none', but distributed.process_id is given"),
        ({**SLURM, "SLURM_PROCID": "x"}, {}, "SLURM: SLURM_PROCID is 'x'; expected a number"),
        (
            SLURM,
            {"coordinator_address": "a:1", "num_processes": 2},
            "this is process 2 of 2 .*; expected 0 to 1",
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, {}, "is 'two'; expected a list such as"),
    ],
)
def test_what_is_wrong_is_said(environment: dict[str, str], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(environment, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"coordinator_address": "node1"},
        {"coordinator_address": "node1:70000"},
        {"num_processes": 0},
        {"process_id": 2, "num_processes": 2},
        {"heartbeat_timeout_seconds": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"distributed\.{next(iter(flags))} is "):
        DistributedConfig(**flags)


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("") == []
