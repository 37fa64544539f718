"""The benchmark for GPUs runs everywhere with small shapes; its figures are looked at where there is a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.harness.random_weights import RandomWeights
from bench.kernels import gpu
from easyspec.errors import ConfigurationError
from easyspec.parallel.layer_groups import sequential_plan
from tests.model.conftest import one_thread

__all__ = ["one_thread"]


def test_small_shapes_run_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "gpu.json"
    assert gpu.BENCHMARK.main(["--tiny", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["command"] == f"python -m bench.gpu --tiny --json {path}"
    assert report["settings"]["base"]["name"] == "tiny-base"
    assert report["commit"]
    assert report["machine"]["torch"]
    assert report["copy_gb_per_s"] > 0
    assert report["row_invariant"] is True
    results = report["results"]
    assert {each["plan"] for each in results} == {"sequential", "n2-sequential", "n2-staged"}
    for each in results:
        assert each["median_ms"] >= each["best_ms"] > 0
        assert each["times_floor"] == pytest.approx(each["median_ms"] / each["floor_ms"], rel=0.15), "rounded"
    assert "x floor" in capsys.readouterr().out


def test_the_floor_counts_what_must_be_read(tmp_path: Path) -> None:
    settings = gpu.TINY
    bench = gpu.Bench(settings.base, settings, gpu.Device(torch.device("cpu")), tmp_path)
    embeddings = settings.base.vocab_size * settings.base.hidden_size
    linears = bench.decoder.num_parameters - embeddings
    # 3 layers, key and value of 2 heads of 16, in sessions of 20 tokens and 4 more.
    bench.prepare()
    found = bench.measure(sequential_plan(3), "sequential", num_sessions=2, num_rows=4, speed=1e3)
    assert found["floor_ms"] == 4 * (linears + 3 * 2 * 2 * 16 * 2 * 24)


def test_full_shapes_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no GPU"):
        gpu.BENCHMARK.main([])


def test_random_weights_have_a_name() -> None:
    weights = RandomWeights(torch.device("cpu"))
    whole = weights.tensor("a.weight", (6, 4))
    assert torch.equal(weights.tensor("a.weight", (6, 4), range(2, 4), range(1, 3)), whole[2:4, 1:3])
    assert not torch.equal(weights.tensor("b.weight", (6, 4)), whole)
