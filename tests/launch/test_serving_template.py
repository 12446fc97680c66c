"""The Kubernetes template of the server: well formed, and in step with the command and its routes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3_jax.serving import __main__ as command
from tests.inference import tiny

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    text = (REPO / "launch" / "kubernetes-serving.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return dict(objects["Deployment"]["spec"]["template"]["spec"])


def test_the_service_and_the_policy_find_the_pods(
    objects: dict[str, dict[str, Any]], pod: dict[str, Any]
) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert (
        objects["NetworkPolicy"]["spec"]["egress"] == []
        and "Egress" in objects["NetworkPolicy"]["spec"]["policyTypes"]
    )
    [container] = pod["containers"]
    [port] = container["ports"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    annotations = objects["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])


def test_the_arguments_are_the_commands(
    pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def serve(model: Any, settings: Any, make_engine: Any, **more: Any) -> int:
        given.update(more, settings=settings)
        return 0

    [container] = pod["containers"]
    assert container["command"][1:] == ["-m", "dsv3_jax.serving"]
    args = [str(tiny.save(tmp_path)) if arg == "/models/v3" else arg for arg in container["args"]]
    monkeypatch.setattr("dsv3_jax.serving.command.serve", serve)
    monkeypatch.setattr(sys, "argv", ["serving", *args])
    monkeypatch.setenv("DSV3_API_KEY", "k")
    assert command.main() == 0
    assert given["host"] == "0.0.0.0" and given["port"] == container["ports"][0]["containerPort"]
    assert given["settings"].model_id == "deepseek-v3" and given["settings"].api_key == "k"
    [key] = [item for item in container["env"] if item["name"] == "DSV3_API_KEY"]
    assert "secretKeyRef" in key["valueFrom"] and "k" not in args
    # Draining fits into what Kubernetes grants: the wait before SIGTERM, then the longest request.
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + given["settings"].request_timeout + 10 <= pod["terminationGracePeriodSeconds"]


def test_probes_ask_routes_that_mean_what_they_ask(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert (
        container["readinessProbe"]["httpGet"]["path"]
        == container["startupProbe"]["httpGet"]["path"]
        == "/readyz"
    )
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True and "/tmp" in mounts
