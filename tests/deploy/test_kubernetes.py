"""deploy/kubernetes: every reference resolves, every setting exists, every probe asks what is there.

The files are read as they are; where kubectl is present, what kustomize makes of them is checked too.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.environment import AFTER_DRAIN_S, SERVICE_NAMES, SETTINGS, settings_of

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
BASE = FOLDER / "base"
ROLES = tuple(SETTINGS)
KUSTOMIZATIONS = sorted(FOLDER.rglob("kustomization.yaml"))
COMPONENTS = [path for path in KUSTOMIZATIONS if "components" in path.parts]


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


@pytest.fixture(scope="module")
def base() -> list[dict[str, Any]]:
    kustomization = documents(BASE / "kustomization.yaml")[0]
    return [one for name in kustomization["resources"] for one in documents(BASE / name)]


def variables(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    return dict(workload["spec"]["template"])


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(workload)["spec"]["containers"]
    return dict(container)


def matches(selector: dict[str, str], workload: dict[str, Any]) -> bool:
    return selector.items() <= pod_of(workload)["metadata"]["labels"].items()


def base_variables(role: str) -> dict[str, str]:
    return variables(BASE / "settings" / f"{role}.env")


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_file_is_yaml_and_every_object_has_a_name(path: Path) -> None:
    assert documents(path)
    for document in documents(path):
        assert document["apiVersion"]
        assert document["kind"] in ("Kustomization", "Component") or document["metadata"]["name"].startswith("easyspec")


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(FOLDER)))
def test_a_kustomization_names_files_that_are_there(path: Path) -> None:
    (kustomization,) = documents(path)
    for name in (*kustomization.get("resources", []), *kustomization.get("components", [])):
        assert (path.parent / name).exists(), name
    listed = {path.parent / name for name in kustomization.get("resources", [])} | {path}
    assert set(path.parent.glob("*.yaml")) <= listed, "a file that nothing applies"


@pytest.mark.parametrize("role", ROLES)
def test_settings_exist_and_are_allowed(role: str) -> None:
    settings = settings_of(role, base_variables(role))
    assert settings.address == f"0.0.0.0:{SETTINGS[role].model_fields['address'].default.rpartition(':')[2]}"


def test_the_gateway_finds_the_headless_services(base: list[dict[str, Any]]) -> None:
    services = of_kind(base, "Service")
    wired = base_variables("gateway")
    for role in ("verifier", "drafter"):
        service = services[f"easyspec-{role}"]
        assert service["spec"]["clusterIP"] == "None"
        (port,) = service["spec"]["ports"]
        assert wired[f"EASYSPEC_GATEWAY_{role.upper()}_ADDRESS"] == f"dns:///easyspec-{role}:{port['port']}"
    model = base_variables("verifier")["EASYSPEC_VERIFIER_MODEL"]
    assert wired["EASYSPEC_GATEWAY_TOKENIZER"] == base_variables("drafter")["EASYSPEC_DRAFTER_TOKENIZER"] == model


def test_every_selector_finds_its_pods_and_every_port_its_name(base: list[dict[str, Any]]) -> None:
    workloads = of_kind(base, "Deployment")
    assert set(workloads) == {f"easyspec-{role}" for role in ROLES}
    for name, service in of_kind(base, "Service").items():
        (found,) = [one for one in workloads.values() if matches(service["spec"]["selector"], one)]
        ports = {port["name"]: port["containerPort"] for port in container_of(found)["ports"]}
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]], name
    for kind, selector_of in (
        ("Deployment", lambda one: one["spec"]["selector"]["matchLabels"]),
        ("PodDisruptionBudget", lambda one: one["spec"]["selector"]["matchLabels"]),
        ("NetworkPolicy", lambda one: one["spec"]["podSelector"]["matchLabels"]),
    ):
        for name, one in of_kind(base, kind).items():
            assert [found for found in workloads if matches(selector_of(one), workloads[found])] == [name], kind
    assert set(of_kind(base, "PodDisruptionBudget")) == set(workloads)
    assert set(of_kind(base, "NetworkPolicy")) == {"easyspec-verifier", "easyspec-drafter"}


@pytest.mark.parametrize("role", ROLES)
def test_probes_ask_the_service_where_it_listens(base: list[dict[str, Any]], role: str) -> None:
    container = container_of(of_kind(base, "Deployment")[f"easyspec-{role}"])
    port = int(base_variables(role)[f"EASYSPEC_{role.upper()}_ADDRESS"].rpartition(":")[2])
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["grpc"] == {"port": port, "service": SERVICE_NAMES[role]}
    assert {"name": "grpc", "containerPort": port} in container["ports"]
    for name in ("HTTP_ADDRESS", "METRICS_ADDRESS"):
        address = base_variables(role).get(f"EASYSPEC_{role.upper()}_{name}")
        if address is not None:
            declared = {"name": name.partition("_")[0].lower(), "containerPort": int(address.rpartition(":")[2])}
            assert declared in container["ports"]


@pytest.mark.parametrize("role", ROLES)
def test_a_pod_is_killed_only_after_it_has_drained(base: list[dict[str, Any]], role: str) -> None:
    workload = of_kind(base, "Deployment")[f"easyspec-{role}"]
    command = container_of(workload).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
    settings = settings_of(role, base_variables(role))
    least_s = float(command[1]) + settings.drain_grace_s + AFTER_DRAIN_S
    assert pod_of(workload)["spec"]["terminationGracePeriodSeconds"] >= least_s


def workloads_everywhere() -> Iterator[dict[str, Any]]:
    for path in sorted(FOLDER.rglob("*.yaml")):
        for document in documents(path):
            if document["kind"] == "Deployment":
                yield pod_of(document)["spec"]
            if document["kind"] == "LeaderWorkerSet":
                yield document["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]


def test_nobody_can_do_more_than_needed() -> None:
    pods = list(workloads_everywhere())
    assert len(pods) == len(ROLES) + 1
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        mounted = set()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
            mounted |= {mount["name"] for mount in container["volumeMounts"]}
            assert {"/tmp", "/cache"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def literals(path: Path) -> dict[str, dict[str, str]]:
    """Settings that a kustomization adds, by role."""
    (kustomization,) = documents(path)
    generated = kustomization.get("configMapGenerator", [])
    return {
        one["name"].removeprefix("easyspec-"): dict(line.split("=", 1) for line in one.get("literals", []))
        for one in generated
    }


@pytest.mark.parametrize("path", [path for path in KUSTOMIZATIONS if path.parent != BASE], ids=lambda p: p.parent.name)
def test_what_is_added_to_the_settings_exists_and_fits(path: Path) -> None:
    for role, added in literals(path).items():
        settings_of(role, base_variables(role) | added)


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.parent.name)
def test_patches_meet_what_is_there(base: list[dict[str, Any]], path: Path) -> None:
    (component,) = documents(path)
    names = set(of_kind(base, "Deployment"))
    for patch in component.get("patches", []):
        target = patch["target"]
        assert target["kind"] == "Deployment"
        if "name" in target:
            wanted = {f"easyspec-{role}" for role in ROLES if role in target["name"]}
            assert wanted <= names
            assert wanted
        for operation in yaml.safe_load(patch["patch"]):
            assert operation["op"] in ("add", "replace", "remove")
            if operation["op"] != "add":
                assert resolves(of_kind(base, "Deployment")["easyspec-verifier"], operation["path"]), operation


def resolves(document: Any, pointer: str) -> bool:
    for part in pointer.strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            document = document[int(key)] if isinstance(document, list) else document[key]
        except (KeyError, IndexError):
            return False
    return True


def test_probes_with_tls_are_commands_of_the_same_service() -> None:
    (component,) = documents(FOLDER / "components" / "tls" / "kustomization.yaml")
    for role, patch in zip(ROLES, component["patches"], strict=True):
        operations = yaml.safe_load(patch["patch"])
        probes = [one["value"]["exec"]["command"] for one in operations if one["path"].endswith("Probe")]
        assert len(probes) == 3
        port = SETTINGS[role].model_fields["address"].default.rpartition(":")[2]
        for command in probes:
            assert command[:5] == ["python", "-m", "easyspec.rpc.health", f"127.0.0.1:{port}", SERVICE_NAMES[role]]
            assert command[-1] == f"easyspec-{role}"


def test_the_autoscaler_asks_for_a_metric_of_a_workload(base: list[dict[str, Any]]) -> None:
    scaled = documents(FOLDER / "components" / "autoscaling" / "scaled-objects.yaml")
    for one in scaled:
        assert one["spec"]["scaleTargetRef"]["name"] in of_kind(base, "Deployment")
        (trigger,) = one["spec"]["triggers"]
        assert "vllm:num_requests_waiting" in trigger["metadata"]["query"]


needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="KUSTOMIZE NOT RUN: there is no kubectl here"
)


@needs_kubectl
@pytest.mark.parametrize("name", ["base", "examples/production"])
def test_kustomize_makes_objects_whose_references_resolve(name: str) -> None:
    rendered = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / name)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    settings = of_kind(objects, "ConfigMap")
    for role in ROLES:
        workload = of_kind(objects, "Deployment")[f"easyspec-{role}"]
        (source,) = container_of(workload)["envFrom"]
        settings_of(role, settings[source["configMapRef"]["name"]]["data"])
        mounted = {mount["name"] for mount in container_of(workload)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod_of(workload)["spec"]["volumes"]}


def test_the_example_tells_all_roles_of_the_same_base_model() -> None:
    example = documents(FOLDER / "examples" / "production" / "kustomization.yaml")[0]
    literals = [line for one in example["configMapGenerator"] for line in one.get("literals", [])]
    told = dict(line.split("=", 1) for line in literals)
    model = told["EASYSPEC_VERIFIER_MODEL"]
    assert told["EASYSPEC_GATEWAY_TOKENIZER"] == told["EASYSPEC_DRAFTER_TOKENIZER"] == model
