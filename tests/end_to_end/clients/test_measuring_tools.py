"""Programs that measure servers, as their packages have them: they run, and agree with our own counters."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.clients.environments import installed

MODEL = Path(__file__).resolve().parents[3] / "models" / "base"
SCRIPT = Path(__file__).parent / "scripts" / "lm_eval_client.py"
NUM_REQUESTS, NUM_TOKENS = 12, 24

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5000)]


def counters(base_url: str) -> dict[str, float]:
    """Our own, by name, summed over their labels."""
    with urllib.request.urlopen(f"{base_url.removesuffix('/v1')}/metrics", timeout=60) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line.startswith("vllm:")]
    found: dict[str, float] = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        found[name.partition("{")[0]] = found.get(name.partition("{")[0], 0.0) + float(value)
    return found


def counted(before: dict[str, float], after: dict[str, float]) -> tuple[float, ...]:
    """(requests, prompt tokens, output tokens, seconds to the first tokens) in between."""
    names = (
        "request_success_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_sum",
    )
    return tuple(after[f"vllm:{name}"] - before[f"vllm:{name}"] for name in names)


def test_lm_evaluation_harness(base_url: str, tmp_path: Path) -> None:
    """Every log-likelihood is that of its own `hf` model, with texts and with tokens."""
    environment = installed(tmp_path / "environment", "lm-eval[api]", sees_ours=True)
    told = environment.run("python", str(SCRIPT), base_url, str(MODEL), str(tmp_path / "task"))
    results: dict[str, list[float]] = json.loads(told.splitlines()[-1])
    assert len(results["hf"]) == len(set(results["hf"])) > 30
    assert results["tokens"] == pytest.approx(results["hf"], abs=1e-3)
    assert results["texts"] == pytest.approx(results["hf"], abs=1e-3)


def test_guidellm(base_url: str, tmp_path: Path) -> None:
    environment = installed(tmp_path / "environment", "guidellm", sees_ours=True)
    report = tmp_path / "report.json"
    before = counters(base_url)
    environment.run(
        *("guidellm", "run", "--backend", f"kind=openai_http,target={base_url.removesuffix('/v1')},model=base"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--disable-console-interactive"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={NUM_TOKENS}"),
        *("--output", f"kind=json,path={report}"),
        HF_HUB_OFFLINE="1",
    )
    metrics: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    num_requests, num_prompt, num_output, first_s = counted(before, counters(base_url))
    assert num_requests == NUM_REQUESTS
    assert metrics["prompt_token_count"]["successful"]["total_sum"] == num_prompt
    assert metrics["output_token_count"]["successful"]["total_sum"] == num_output == NUM_REQUESTS * NUM_TOKENS
    # It sees what is on the way as well, never less.
    told_s = metrics["time_to_first_token_ms"]["successful"]["mean"] * NUM_REQUESTS / 1000
    assert first_s <= told_s <= first_s + NUM_REQUESTS * 0.5


def test_aiperf(base_url: str, tmp_path: Path) -> None:
    environment = installed(tmp_path / "environment", "aiperf")
    before = counters(base_url)
    environment.run(
        *("aiperf", "profile", "--model", "base", "--url", base_url.removesuffix("/v1"), "--endpoint-type", "chat"),
        *("--streaming", "--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--isl", "32"),
        *("--osl", str(NUM_TOKENS), "--extra-inputs", "ignore_eos:true", "--tokenizer", str(MODEL)),
        *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--artifact-dir", str(tmp_path / "artifacts")),
    )
    report: dict[str, Any] = json.loads((tmp_path / "artifacts" / "profile_export_aiperf.json").read_text())
    num_requests, num_prompt, num_output, first_s = counted(before, counters(base_url))
    assert num_requests == report["request_count"]["avg"] == NUM_REQUESTS
    assert num_output == NUM_REQUESTS * NUM_TOKENS
    assert report["usage_completion_tokens"]["avg"] * NUM_REQUESTS == pytest.approx(num_output)
    assert report["usage_prompt_tokens"]["avg"] * NUM_REQUESTS == pytest.approx(num_prompt)
    told_s = report["time_to_first_token"]["avg"] * NUM_REQUESTS / 1000
    assert first_s <= told_s <= first_s + NUM_REQUESTS * 0.5
