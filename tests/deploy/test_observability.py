"""Three live processes: what they export, what the dashboard asks for, what the documents say, what the logs hold."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from easyspec.cli.processes import ServiceStack, StackSettings

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy" / "observability"
DASHBOARD = json.loads((OBSERVABILITY / "grafana" / "dashboards" / "easyspec.json").read_text(encoding="utf-8"))
METRICS_FLAGS = ("--metrics-address", "127.0.0.1:0")
PROMPT = "zebra crossing at quarter past"
REQUEST_ID = "request-of-the-test"
# Three processes start for them, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(300)
# Words of PromQL that our expressions use, and labels that Prometheus adds.
WORDS = {"sum", "by", "le", "rate", "count", "max", "histogram_quantile", "job", "instance"}


@dataclass(frozen=True)
class Exported:
    """Of all roles: names of samples, of families as PromQL users write them, and the labels of each sample."""

    samples: dict[str, set[str]]
    families: set[str]
    roles: dict[str, str]
    logs: dict[str, list[str]]
    answer: str


@pytest.fixture(scope="module")
def exported(base_folder: Path, draft_folder: Path) -> Exported:
    """Scraped after a request over REST, and a refused one."""
    return asyncio.run(_export(base_folder, draft_folder))


async def _export(base_folder: Path, draft_folder: Path) -> Exported:
    logs: dict[str, list[str]] = {"gateway": [], "drafter": [], "verifier": []}
    flags = dict.fromkeys(("drafter", "verifier"), (*METRICS_FLAGS, "--num-threads", "1"))
    settings = StackSettings(
        base_folder, draft_folder, http_address="127.0.0.1:0", flags=flags | {"gateway": METRICS_FLAGS}
    )
    async with ServiceStack(settings, lambda role, line: logs[role].append(line)):
        events = {role: [json.loads(line) for line in lines] for role, lines in logs.items()}
        ports = {role: _port(of_role, "metrics") for role, of_role in events.items()}
        url = f"http://127.0.0.1:{_port(events['gateway'], 'rest_listening')}/v1/completions"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            body = {"prompt": PROMPT, "max_tokens": 40, "stop": ["neversaid"], "temperature": 0.5, "seed": 1}
            response = await http.post(url, json=body, headers={"x-request-id": REQUEST_ID})
            assert response.status_code == 200, response.text
            assert (await http.post(url, json=body | {"temperature": -1})).status_code == 400
            scraped = {role: (await http.get(f"http://127.0.0.1:{port}/metrics")).text for role, port in ports.items()}
            for port in ports.values():
                assert (await http.get(f"http://127.0.0.1:{port}/health")).text == "SERVING\n"
    samples: dict[str, set[str]] = {}
    families: set[str] = set()
    for text in scraped.values():
        for family in text_string_to_metric_families(text):
            families.add(family.name + ("_total" if family.type == "counter" else ""))
            for sample in family.samples:
                samples.setdefault(sample.name, set()).update(sample.labels)
    return Exported(samples, families, scraped, logs, response.json()["choices"][0]["text"])


def _port(events: list[dict[str, Any]], name: str) -> int:
    [port] = [event["port"] for event in events if event["event"] == name]
    return int(port)


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of the dashboard and the alerts."""
    for panel in DASHBOARD["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel.get("targets", ()))
    alerts = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text(encoding="utf-8"))
    for group in alerts["groups"]:
        yield from ((rule["alert"], rule["expr"]) for rule in group["rules"])
    for variable in DASHBOARD["templating"]["list"]:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
        assert match is not None
        yield variable["name"], f"count by ({match[2]}) ({match[1]})"


def metrics_of(expression: str) -> set[str]:
    """Everything in an expression that is neither a label, a number nor a word of PromQL."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", "", expression)
    return set(re.findall(r"[A-Za-z_:][A-Za-z0-9_:]*", bare)) - WORDS


def labels_of(expression: str) -> set[str]:
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    matched = re.findall(r"\{([^}]*)\}", expression)
    names = {name.strip() for group in grouped for name in group.split(",")}
    return names | {name for text in matched for name in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", text)}


def test_every_expression_asks_for_metrics_and_labels_that_are_exported(exported: Exported) -> None:
    checked = 0
    for where, expression in expressions():
        assert expression.count("(") == expression.count(")"), where
        names = metrics_of(expression)
        assert names, where
        unknown = names - set(exported.samples)
        assert not unknown, (where, unknown)
        known_labels = set().union(*(exported.samples[name] for name in names)) | {"job", "instance", "le"}
        assert labels_of(expression) <= known_labels, where
        checked += 1
    assert checked > 60


def test_a_metric_that_nobody_exports_is_seen(exported: Exported) -> None:
    assert metrics_of('sum by (le) (rate(vllm:nonsense_bucket{model_name=~"$model"}[5m])) / easyspec_rounds_total') == {
        "vllm:nonsense_bucket",
        "easyspec_rounds_total",
    }
    assert labels_of('sum by (le, kind) (rate(x{model_name=~"$model", a="b"}[5m]))') == {
        "le",
        "kind",
        "model_name",
        "a",
    }


def test_the_dashboard_shows_everything_that_is_ours(exported: Exported) -> None:
    asked = {name for _, expression in expressions() for name in metrics_of(expression)}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} | asked
    ours = {name for name in exported.families if name.startswith(("easyspec_", "vllm:"))}
    assert ours - shown == set()


def test_the_documents_list_exactly_what_is_exported(exported: Exported) -> None:
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `((?:easyspec_|vllm:)\w+)`", text, re.MULTILINE))
    ours = {name for name in exported.families if name.startswith(("easyspec_", "vllm:"))}
    assert documented == ours


def test_every_role_exports_what_it_did(exported: Exported) -> None:
    assert 'vllm:generation_tokens_total{model_name="' in exported.roles["gateway"]
    for role, kind in (("verifier", "verify"), ("drafter", "draft")):
        match = re.search(rf'^easyspec_engine_step_rows_sum{{kind="{kind}"}} (.*)$', exported.roles[role], re.MULTILINE)
        assert match is not None
        assert float(match[1]) > 40
        assert 'easyspec_rpcs_total{code="OK",method="' in exported.roles[role]


def test_logs_of_three_processes_share_the_request_id_and_hold_nothing_that_was_said(exported: Exported) -> None:
    assert len(exported.answer) > 20
    for role, lines in exported.logs.items():
        assert [line for line in lines if REQUEST_ID in line], role
        text = "\n".join(lines)
        for said in ("zebra", "crossing", "quarter", "neversaid", exported.answer[:12]):
            assert said not in text, role
        # Probes between services are too frequent to be worth reading.
        assert "Info" not in text.replace("info", ""), role
    finished = [event for event in map(json.loads, exported.logs["gateway"]) if event["event"] == "request_finished"]
    assert [event["reason"] for event in finished] == ["length", "error"]


def test_provisioning_fits_together() -> None:
    grafana = OBSERVABILITY / "grafana" / "provisioning"
    [source] = yaml.safe_load((grafana / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    [provider] = yaml.safe_load((grafana / "dashboards" / "easyspec.yml").read_text(encoding="utf-8"))["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if panel["type"] != "row"}
    assert used == {source["uid"]}
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    scrape = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text(encoding="utf-8"))
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    second = yaml.safe_load((ROOT / "docker-compose.two-models.yml").read_text(encoding="utf-8"))["services"]
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in scrape["scrape_configs"]}
    assert set(jobs) == {"gateway", "drafter", "verifier"}
    for role, job in jobs.items():
        variable = f"EASYSPEC_{role.upper()}_{'HTTP' if role == 'gateway' else 'METRICS'}_ADDRESS"
        assert services[role]["environment"][variable] == f"0.0.0.0:{job['port']}"
        assert job["names"] == [role, *(name for name in second if name.startswith(role) and name != role)]
    mounted = {volume.partition(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]}
    for path in ("prometheus.yml", *scrape["rule_files"], "grafana/provisioning", "grafana/dashboards"):
        assert f"./deploy/observability/{path}" in mounted
