from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model import kv_budget
from easyspec.model.config import ModelConfig
from easyspec.model.kv_budget import context_within, free_bytes, num_pool_slots
from easyspec.model.layer_spec import ModelSpec, NormSpec
from easyspec.ops.kv_pool import KVPool
from tests.fakes.checkpoints import write_checkpoint

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    max_model_len=64,
    tie_word_embeddings=False,
    eos_token_ids=(),
    dtype=torch.float32,
    hf_config=None,
    spec=ModelSpec((), NormSpec(1e-6)),
)

LARGE = replace(CONFIG, num_layers=80, num_kv_heads=8, head_dim=128, max_model_len=4096)


def test_a_pool_is_as_large_as_the_setting_says() -> None:
    assert num_pool_slots(CONFIG, CPU, 77, 0.5) == 77
    assert num_pool_slots(CONFIG, CPU, 77, None, 3.0) == 77
    assert num_pool_slots(LARGE, CPU, None, 0.5, 3.0) == 3 * 2**30 // KVPool.slot_bytes(80, 8, 128, torch.float32)


def test_without_a_setting_a_large_models_pool_is_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "free_bytes", lambda device: 10 * 2**30)
    slot_bytes = KVPool.slot_bytes(80, 8, 128, LARGE.dtype)
    assert num_pool_slots(LARGE, CPU, None, None) == 2 * 2**30 // slot_bytes
    assert num_pool_slots(LARGE, CPU, None, 0.5) == 5 * 2**30 // slot_bytes


def test_a_small_models_pool_is_no_larger_than_a_cpu_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "free_bytes", lambda device: 10 * 2**30)
    assert num_pool_slots(CONFIG, CPU, None, None) == 32_768
    assert num_pool_slots(replace(CONFIG, max_model_len=10_000), CPU, None, None) == 40_000


def test_what_a_step_takes_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "free_bytes", lambda device: 10 * 2**30)
    slot_bytes = KVPool.slot_bytes(80, 8, 128, LARGE.dtype)
    step_bytes = 2 * 2**30
    assert num_pool_slots(LARGE, CPU, None, 1.0, None, step_bytes) == 8 * 2**30 // slot_bytes
    fitting = 8 * 2**30 // slot_bytes
    assert num_pool_slots(LARGE, CPU, fitting, None, None, step_bytes) == fitting
    with pytest.raises(
        ConfigurationError, match="allowed: at most 8192 MiB, which are free beside 2048 MiB for a step"
    ):
        num_pool_slots(LARGE, CPU, fitting + 1, None, None, step_bytes)
    with pytest.raises(ConfigurationError, match=r"KV memory is 921\d MiB"):
        num_pool_slots(LARGE, CPU, None, None, 9.0, step_bytes)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("executor", ["native", "reference"])
def test_a_pass_takes_no_more_than_was_kept_free(tmp_path: Path, executor: str) -> None:
    """Resident memory of a process of its own: the most it had, with the pass and without."""
    write_checkpoint(tmp_path, has_tokenizer=False)
    script = f"""
import sys, torch
from pathlib import Path
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.executor import choose_executor

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

folder, rows = Path({str(tmp_path)!r}), 2048
config = load_config(folder, "float32", None)
decoder = Decoder(folder, config, choose_executor({executor!r}, torch.device("cpu"), 1))
memory = KvMemory(decoder.new_pool(rows), shares_prefixes=False)
memory.pool.keys.fill_(0.0), memory.pool.values.fill_(0.0)

def run(count):
    segments = []
    for _ in range(count // 16):
        slots = SessionSlots(memory)
        taken = slots.extend(16)
        segments.append(Segment([1] * 16, range(16), taken, range(1, 17), slots.by_position))
    with torch.inference_mode():
        decoder.forward(lay_out(segments), memory.pool, logit_rows=range(count))

run(16)
before = peak()
run(rows - 16)
print(peak() - before, decoder.step_bytes(rows, config.max_model_len))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    taken, kept = map(int, done.stdout.split())
    assert 0 < taken < kept + (4 << 20), "beside what Python takes for the rows"
    assert kept < 4 * taken


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kv_budget, "_CGROUP", tmp_path)
    of_the_machine = free_bytes(CPU)
    assert of_the_machine > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU) == 4000


def test_the_context_is_what_fits_beside_a_tree() -> None:
    assert context_within(1000, 16, CONFIG, None) == 64
    assert context_within(50, 16, CONFIG, None) == 34
    assert context_within(50, 16, replace(CONFIG, max_model_len=34), 34) == 34
    with pytest.raises(ConfigurationError, match="num_kv_slots is 49; allowed: at least 50, for max_model_len 34"):
        context_within(49, 16, replace(CONFIG, max_model_len=34), 34)
    with pytest.raises(ConfigurationError, match="num_kv_slots is 17; allowed: at least 18"):
        context_within(17, 16, CONFIG, None)
