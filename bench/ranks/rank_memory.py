"""`python -m bench rank-memory`: how much memory each rank of a tensor-parallel model takes while it loads.

Writes a random checkpoint of about half a gigabyte into a temporary folder (or takes `--model`), loads it on 1, 2 and 4
ranks of this machine, and prints what each rank's resident memory rose by, above the process with its libraries and its
group: at most while it loaded, and when it was ready to run. Pages of the checkpoint that are mapped count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console

from bench.chaos.limits import process_status
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.machine import REPOSITORY
from bench.harness.tables import Column, ResultTable
from easyspec.model.config import ModelConfig, load_config
from easyspec.model.decoder import Decoder
from easyspec.ops.executor import choose_executor
from easyspec.parallel.launch import torchrun_arguments
from easyspec.parallel.ranks import join_group, leave_group

_CPU = torch.device("cpu")
_MIB = 2**20
_TIMEOUT_S = 300
_COLUMNS = (
    Column("ranks", "num_ranks"),
    Column("peak while loading, MiB a rank", lambda row: _mib(each["peak_bytes"] for each in row["ranks"])),
    Column("ready to run, MiB a rank", lambda row: _mib(each["ready_bytes"] for each in row["ranks"])),
)


@dataclass(frozen=True)
class MemorySettings:
    model: Annotated[Path | None, flag("A checkpoint folder instead of random weights.")] = None
    ranks: Annotated[tuple[int, ...], flag("Sizes of groups; one or several.", minimum=1)] = (1, 2, 4)


def measure(settings: MemorySettings, console: Console) -> Findings:
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.model or write_random_llama(Path(temporary))
        config = load_config(folder)
        file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows = [{"num_ranks": size, "ranks": load_on(folder, size)} for size in settings.ranks]
    title = (
        f"A checkpoint of {file_bytes / _MIB:.0f} MiB in {str(config.dtype).removeprefix('torch.')}, of which "
        f"{replicated_bytes(config) / _MIB:.0f} MiB (embeddings) are on every rank."
    )
    return Findings({"results": rows}, [ResultTable(title, _COLUMNS, rows)])


def write_random_llama(folder: Path) -> Path:
    """A checkpoint of 500 MB of small random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM  # not in the ranks, whose memory is measured

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def load_on(folder: Path, num_ranks: int) -> list[dict[str, int]]:
    """Load a checkpoint on so many ranks, each a process of its own; what each says of itself, by rank. Raises
    CalledProcessError."""
    command = [sys.executable, *torchrun_arguments(num_ranks), "-m", "bench.ranks.rank_memory", str(folder)]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S, check=True)
    found = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
    return sorted(found, key=lambda memory: memory["rank"])


def replicated_bytes(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size * config.dtype.itemsize


def _measure_own(folder: Path) -> dict[str, int]:
    """Under torchrun: of this rank, bytes above what the process had before: the most while loading, and when ready."""
    torch.set_num_threads(1)
    config = load_config(folder)
    ranks = join_group(_CPU)
    ranks.sum(torch.ones(1))
    executor = choose_executor("auto", _CPU, num_threads=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = process_status(os.getpid())["VmRSS"]
    decoder = Decoder(folder, config, executor, ranks=ranks)
    status = process_status(os.getpid())
    peak, ready = 1024 * (status["VmHWM"] - before), 1024 * (status["VmRSS"] - before)
    assert decoder.num_weight_bytes <= 1024 * status["VmRSS"], "weights are in memory"
    leave_group()
    return {"rank": ranks.rank, "peak_bytes": peak, "ready_bytes": ready}


def _mib(sizes: Iterable[int]) -> str:
    return " ".join(f"{size / _MIB:.0f}" for size in sizes)


BENCHMARK = Benchmark("python -m bench rank-memory", __doc__, MemorySettings, measure, is_markdown=True)

if __name__ == "__main__":  # one rank of `load_on`
    print(json.dumps(_measure_own(Path(sys.argv[1]))), flush=True)
