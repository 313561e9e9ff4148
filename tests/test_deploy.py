"""The container file and the manifests agree with the commands, the probes and each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from softprompt.scale.settings import GatewaySettings
from softprompt.serving.settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
OBJECTS: list[dict[str, Any]] = [
    tree for path in MANIFESTS for tree in yaml.safe_load_all(path.read_text("utf-8"))
]
PODS = {
    tree["metadata"]["name"]: tree["spec"]["template"]
    for tree in OBJECTS
    if tree["kind"] in ("StatefulSet", "Deployment")
}


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["spec"]["containers"]
    return dict(only)


def flags(pod: str) -> dict[str, str]:
    """What a pod's command is given: flag -> value."""
    return dict(argument.split("=", 1) for argument in container(pod)["args"])


@pytest.mark.parametrize("pod", sorted(PODS))
def test_a_pod_passes_settings_that_exist_and_hold(pod: str) -> None:
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in flags(pod).items()}
    tables = (ServeSettings, GatewaySettings)
    assert set(given) <= {name for table in tables for name in table.model_fields}
    for table in tables:
        table.model_validate(
            {
                name: tuple(value.split(",")) if name == "engine" else yaml.safe_load(value)
                for name, value in given.items()
                if name in table.model_fields
            }
        )


@pytest.mark.parametrize("pod", sorted(PODS))
def test_a_pod_is_given_longer_to_end_than_its_answers(pod: str) -> None:
    sleep = (
        container(pod).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    )
    longest = float(sleep[1]) + float(flags(pod)["--grace-seconds"])
    assert PODS[pod]["spec"]["terminationGracePeriodSeconds"] > longest


def test_a_gateway_leaves_the_service_before_it_refuses_requests() -> None:
    """An endpoint that ends is taken out of a Service a moment after the pod is told to end."""
    assert container("softprompt-gateway")["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]


@pytest.mark.parametrize("pod", sorted(PODS))
def test_every_probe_asks_for_a_route_that_is_there(pod: str) -> None:
    routes = "scale/gateway_app.py" if pod.endswith("gateway") else "serving/app.py"
    source = (ROOT / "src" / "softprompt" / routes).read_text("utf-8")
    probes = [value for key, value in container(pod).items() if key.endswith("Probe")]
    assert len(probes) == 3
    ports = {port["name"] for port in container(pod)["ports"]}
    for probe in probes:
        assert f'"{probe["httpGet"]["path"]}"' in source
        assert probe["httpGet"]["port"] in ports


@pytest.mark.parametrize("pod", sorted(PODS))
def test_every_mount_has_its_volume_and_every_path_of_a_flag_its_mount(pod: str) -> None:
    volumes = {volume["name"] for volume in PODS[pod]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(pod)["volumeMounts"]}
    assert set(mounts) == volumes
    paths = [value for value in flags(pod).values() if value.startswith("/")]
    assert all(any(path.startswith(mount) for mount in mounts.values()) for path in paths)


def test_the_gateway_names_every_engine_by_the_name_that_the_cluster_gives_it() -> None:
    (engines,) = (tree for tree in OBJECTS if tree["kind"] == "StatefulSet")
    name, service = engines["metadata"]["name"], engines["spec"]["serviceName"]
    port = container(name)["ports"][0]["containerPort"]
    wanted = [f"http://{name}-{number}.{service}:{port}" for number in range(engines["spec"]["replicas"])]
    assert flags("softprompt-gateway")["--engine"].split(",") == wanted


def test_selectors_meet_the_labels_of_the_pods() -> None:
    for tree in OBJECTS:
        selector = tree["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert any(wanted.items() <= pod["metadata"]["labels"].items() for pod in PODS.values()), tree["kind"]


def test_the_container_runs_as_the_user_that_the_manifests_ask_for() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    user = re.search(r"^USER (\d+)$", text, re.MULTILINE)
    assert user is not None
    assert {pod["spec"]["securityContext"]["runAsUser"] for pod in PODS.values()} == {int(user[1])}
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


def test_what_git_ignores_stays_out_of_the_image_and_what_git_knows_comes_in() -> None:
    """A tracked file that is missing makes the checkout a changed one, with another version."""
    patterns = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    left_out = {line.strip("/") for line in patterns if line and not line.startswith("#")}
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    assert {
        line.strip("/") if line.startswith("/") else f"**/{line.strip('/')}" for line in ignored
    } <= left_out
    assert left_out <= {"site", "**/.hypothesis"} | {f"**/{line.strip('/')}" for line in ignored}


def test_the_image_is_built_with_git_which_the_version_comes_from() -> None:
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    assert text.index("install --yes --no-install-recommends git") < text.index("COPY . .")
