"""docker-compose.yml against the code it starts: settings, ports, probes; and the hardening it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyspec.ops.native_library import LIBRARY
from easyspec.settings import EngineSettings
from gateway.service.config import GatewaySettings
from tests.deploy.environment import AFTER_DRAIN_S, SERVICE_NAMES, SETTINGS, settings_of

CHECKOUT = Path(__file__).parents[2]
ROLES = tuple(SETTINGS)
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}")


def with_defaults(text: str) -> str:
    """The text as compose reads it where no variable is set."""
    return VARIABLE.sub(lambda found: found[2] or "", text)


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(with_defaults((CHECKOUT / name).read_text())))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(load("docker-compose.yml")["services"])


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text.removesuffix("s"))


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """What is always set; a variable without a value is passed on if it is set outside."""
    return {name: str(value) for name, value in service["environment"].items() if value is not None}


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_a_setting_and_every_value_allowed(services: dict[str, Any], role: str) -> None:
    settings = settings_of(role, environment_of(services[role]))
    host, _, port = settings.address.rpartition(":")
    assert host == "0.0.0.0"
    assert port == SETTINGS[role].model_fields["address"].default.rpartition(":")[2]
    for name, value in services[role]["environment"].items():
        if value is None and name.startswith("EASYSPEC_"):
            prefix = str(SETTINGS[role].model_config.get("env_prefix"))
            assert name.removeprefix(prefix).lower() in SETTINGS[role].model_fields


def test_the_gateway_finds_the_other_two(services: dict[str, Any]) -> None:
    settings = settings_of("gateway", environment_of(services["gateway"]))
    assert isinstance(settings, GatewaySettings)
    base = settings_of("verifier", environment_of(services["verifier"]))
    assert isinstance(base, EngineSettings)
    assert str(settings.tokenizer) == base.model
    for role, address in (("verifier", settings.verifier_address), ("drafter", settings.drafter_address)):
        port = settings_of(role, environment_of(services[role])).address.rpartition(":")[2]
        assert address == f"dns:///{role}:{port}"
        assert services["gateway"]["depends_on"][role]["condition"] == "service_healthy"


@pytest.mark.parametrize("role", ROLES)
def test_a_health_check_asks_the_service_where_it_listens(services: dict[str, Any], role: str) -> None:
    port = settings_of(role, environment_of(services[role])).address.rpartition(":")[2]
    check = services[role]["healthcheck"]
    assert check["test"] == [
        "CMD",
        "python",
        "-m",
        "easyspec.rpc.health",
        f"127.0.0.1:{port}",
        SERVICE_NAMES[role],
    ]


@pytest.mark.parametrize("role", ROLES)
def test_a_container_is_killed_only_after_it_has_drained(services: dict[str, Any], role: str) -> None:
    settings = settings_of(role, environment_of(services[role]))
    assert seconds(services[role]["stop_grace_period"]) >= settings.drain_grace_s + AFTER_DRAIN_S


def test_nobody_can_do_more_than_needed(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert any(mount.startswith("/tmp") for mount in service["tmpfs"]), name
        assert "privileged" not in service, name
    for role in ROLES:
        assert "memory" in services[role]["deploy"]["resources"]["limits"]


def test_only_this_machine_reaches_the_ports_unless_told_otherwise(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in services["verifier"]
    assert "ports" not in services["drafter"]


def test_the_example_environment_names_what_there_is() -> None:
    used = set(VARIABLE.findall((CHECKOUT / "docker-compose.yml").read_text()))
    for overlay in ("docker-compose.gpu.yml", "docker-compose.two-models.yml"):
        used |= set(VARIABLE.findall((CHECKOUT / overlay).read_text()))
    passed_on = {
        name
        for service in load("docker-compose.yml")["services"].values()
        for name, value in service.get("environment", {}).items()
        if value is None
    }
    described = set(re.findall(r"^#(\w+)=", (CHECKOUT / ".env.example").read_text(), flags=re.MULTILINE))
    assert described <= {name for name, _ in used} | passed_on


def test_the_gpu_file_changes_only_roles_that_are_there() -> None:
    services = load("docker-compose.gpu.yml")["services"]
    assert set(services) == set(ROLES)
    for role in ("verifier", "drafter"):
        (device,) = services[role]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert f"EASYSPEC_{role.upper()}_DEVICE" in services[role]["environment"]


def test_a_second_model_has_its_own_verifier_and_shares_the_drafter(services: dict[str, Any]) -> None:
    further = load("docker-compose.two-models.yml")["services"]
    extended = further["verifier-second"]["extends"]
    assert extended == {"file": "docker-compose.yml", "service": "verifier"}
    verifier = environment_of(services["verifier"]) | environment_of(further["verifier-second"])
    second = settings_of("verifier", verifier)
    assert isinstance(second, EngineSettings)
    assert (CHECKOUT / second.model.removeprefix("/app/")).is_dir()
    settings = settings_of("gateway", environment_of(services["gateway"]) | environment_of(further["gateway"]))
    assert isinstance(settings, GatewaySettings)
    first, route = settings.routes
    assert route.verifier_addresses == (f"dns:///verifier-second:{second.address.rpartition(':')[2]}",)
    assert (route.name, route.drafter_addresses) == (second.served_model_name, first.drafter_addresses)


def test_the_image_copies_what_the_builder_may_see() -> None:
    """A file that .dockerignore hides fails the build; one that nothing copies does not belong there."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (CHECKOUT / "Dockerfile").read_text(), flags=re.MULTILINE)
    sources = {Path(source) for line in copied for source in line.split()}
    ignored = (CHECKOUT / ".dockerignore").read_text().splitlines()
    shown = {Path(line.removeprefix("!")) for line in ignored if line.startswith("!")}
    assert shown <= sources
    assert all({source, *source.parents} & shown for source in sources)
    assert all((CHECKOUT / source).exists() for source in sources)
    # A library built here may need another glibc than the image has.
    assert "**/*.so" in ignored


def test_the_image_takes_the_library_from_the_stage_that_has_a_compiler() -> None:
    stages = (CHECKOUT / "Dockerfile").read_text().split("\nFROM ")
    (compiling,) = (stage for stage in stages if "g++" in stage)
    assert stages.index(compiling) < len(stages) - 1
    assert "AS library" in compiling
    assert LIBRARY.relative_to(CHECKOUT).as_posix() in compiling
    assert f"COPY --from=library /src/{LIBRARY.relative_to(CHECKOUT).as_posix()} " in stages[-2]


def test_what_is_mounted_from_the_checkout_is_there(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            if source.startswith("./"):
                assert (CHECKOUT / source).exists(), f"{name}: {mount}"
