"""Whether and how much to capture, from settings; before a role reports that it is ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import structlog
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.captures import recorder_for
from easyspec.model.decoder import Decoder
from easyspec.model.kv_budget import free_bytes
from easyspec.model.kv_cache import KVPool
from easyspec.model.pass_graphs import CaptureLimits, CaptureReport, CaptureRequest
from easyspec.parallel.launch import group_size

GraphChoice = Literal["auto", "on", "off"]
_BYTES_PER_GIB = 2**30


class GraphSettings(Protocol):
    """The settings that capturing needs; the services' settings have them."""

    @property
    def cuda_graphs(self) -> GraphChoice: ...
    @property
    def cuda_graph_memory_gib(self) -> float: ...


def check_graphs(choice: GraphChoice) -> None:
    """Raise ConfigurationError where graphs are asked for and cannot be had; before anything is loaded."""
    if choice == "on" and group_size() > 1:
        raise ConfigurationError("cuda_graphs is 'on'; allowed with several ranks: auto, off, as they run eagerly")


def is_wanted(choice: GraphChoice, device: torch.device) -> bool:
    """Whether to capture at all."""
    return group_size() == 1 and (choice == "on" or (choice == "auto" and device.type == "cuda"))


def capture_passes(
    decoder: Decoder, pool: KVPool, settings: GraphSettings, requests: Sequence[CaptureRequest]
) -> CaptureReport | None:
    """Capture the passes asked for, if the settings and the device say so, and log what it took; None if they do not.

    On a CPU, where only "on" captures, the twin of every capture is made. A capture that fails leaves the rest of the
    passes eager under "auto", and raises ConfigurationError under "on".
    """
    if not is_wanted(settings.cuda_graphs, decoder.device):
        return None
    # Half of what is left: steps that run eagerly need memory too.
    most = min(int(settings.cuda_graph_memory_gib * _BYTES_PER_GIB), free_bytes(decoder.device) // 2)
    with torch.inference_mode():
        report = decoder.capture(pool, requests, recorder_for(decoder.device), CaptureLimits(max_bytes=most))
    structlog.get_logger().info(
        "graphs_captured",
        device=decoder.device.type,
        num_captured=report.num_captured,
        num_left_out=report.num_left_out,
        duration_s=round(report.duration_ns / 1e9, 3),
        held_mib=round(report.held_bytes / 2**20, 1),
    )
    if report.failure is not None:
        if settings.cuda_graphs == "on":
            raise ConfigurationError(f"cuda_graphs is 'on', and a capture failed: {report.failure}; allowed: auto, off")
        structlog.get_logger().warning("graph_capture_failed", reason=report.failure)
    return report
