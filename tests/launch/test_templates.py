"""The templates for SLURM and Kubernetes: well formed, and in step with what train.py reads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_jax.cli import parse_run_config
from dsv3_jax.launch import Member, detect

REPO = Path(__file__).resolve().parents[2]
SBATCH = REPO / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    text = (REPO / "launch" / "kubernetes.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


def test_slurm_is_a_script_with_the_directives_a_run_needs() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, flags=re.MULTILINE))
    assert {"nodes", "gpus-per-node", "cpus-per-task", "time", "output", "exclusive"} <= directives.keys()
    assert directives["ntasks-per-node"] == "1"  # with more, processes share the node's GPUs
    assert directives["signal"].startswith("TERM@")  # to the processes, not the script: no "B:"
    assert re.search(r"^srun --kill-on-bad-exit=1 .*train\.py \"\$@\"$", text, flags=re.MULTILINE)
    # Directives after the first command would be ignored.
    assert text.rindex("#SBATCH") < text.index("set -euo")


def test_slurm_without_arguments_says_how_and_what_its_header_shows_parses() -> None:
    ended = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "usage: sbatch launch/slurm.sbatch --config FILE" in ended.stderr
    shown = re.search(r"^#   sbatch launch/slurm\.sbatch (.*)$", SBATCH.read_text(), flags=re.MULTILINE)
    assert shown is not None
    assert parse_run_config(shown[1].split()).run.dir == "/shared/runs/v3"


def test_kubernetes_pods_find_each_other(objects: dict[str, dict[str, Any]]) -> None:
    service, job = objects["Service"], objects["Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    assert container["command"][-1] == "train.py"
    cfg = parse_run_config(container["args"])
    # What each pod of the job then knows; JOB_COMPLETION_INDEX is set by Kubernetes.
    for index in range(spec["completions"]):
        member = detect(cfg.distributed, {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": str(index)})
        address = f"{job['metadata']['name']}-0.{pod['subdomain']}:{service['spec']['ports'][0]['port']}"
        assert member == Member("flags and Kubernetes", index, spec["completions"], address, "deactivate", ())


def test_kubernetes_asks_for_gpus_and_keeps_what_a_run_leaves(objects: dict[str, dict[str, Any]]) -> None:
    spec = objects["Job"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    cfg = parse_run_config(container["args"])
    assert "persistentVolumeClaim" in volumes[mounts["/runs"]]
    assert cfg.run.dir is not None and cfg.run.dir.startswith("/runs/")
    assert cfg.data.source.startswith("/runs/")
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    # The policy for exit codes needs Never; a code of wrong use is not tried again, a lost peer (75) is.
    assert pod["restartPolicy"] == "Never"
    [codes] = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes["containerName"] == container["name"] and codes["values"] == [2, 65, 76]
    assert pod["terminationGracePeriodSeconds"] >= 300
