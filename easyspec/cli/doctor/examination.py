"""`easyspec doctor`: all checks, in order."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from easyspec.checkpoint.location import weight_bytes
from easyspec.cli.clients import ANONYMOUS, GatewayAccess
from easyspec.cli.doctor.checkpoints import checkpoint_findings
from easyspec.cli.doctor.clients import PeerReport, check_peer
from easyspec.cli.doctor.machine import machine_findings
from easyspec.cli.doctor.ports import port_findings
from easyspec.cli.doctor.report import Finding, ok, problem
from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint


@dataclass(frozen=True)
class Patient:
    """What to look at: checkpoints, and addresses of running services by role; `access` is for the gateway."""

    base: Path
    draft: Path | None
    peers: dict[str, str] = field(default_factory=dict)
    access: GatewayAccess = ANONYMOUS


async def examine(patient: Patient) -> list[Finding]:
    """The whole report. Ports are looked at only where no running services are named."""
    num_bytes = sum(weight_bytes(path) for path in (patient.base, patient.draft) if path is not None)
    findings = list(machine_findings(num_bytes))
    findings += checkpoint_findings(patient.base, patient.draft)
    if not patient.peers:
        return findings + await port_findings()
    reports = {role: await check_peer(role, address, patient.access) for role, address in patient.peers.items()}
    for report in reports.values():
        findings += report.findings
    return findings + _compare(reports, patient.base)


def _compare(reports: dict[str, PeerReport], base: Path) -> list[Finding]:
    """Whether all services that answered, and the base checkpoint here, have one tokenizer."""
    answered = {role: report.model for role, report in reports.items() if report.model is not None}
    fingerprints = {role: model.tokenizer_fingerprint for role, model in answered.items()}
    if not fingerprints:
        return []
    with contextlib.suppress(ConfigurationError):  # told before
        fingerprints["--base"] = tokenizer_fingerprint(base)
    shown = ", ".join(f"{name} {fingerprint[:12]}" for name, fingerprint in fingerprints.items())
    if len(set(fingerprints.values())) > 1:
        advice = "give every service, and the gateway's --tokenizer, checkpoints with one tokenizer"
        return [problem("peers", f"different tokenizers: {shown}", advice)]
    return [ok("peers", f"one tokenizer: {', '.join(fingerprints)}")]
