"""`python -m bench.rank_memory`: how much memory each rank of a tensor-parallel model takes while it loads.

Writes a random checkpoint of about half a gigabyte into a temporary folder (or takes `--model`), loads it on 1, 2 and 4
ranks of this machine, and prints what each rank's resident memory rose by, above the process with its libraries and its
group: at most while it loaded, and when it was ready to run. Pages of the checkpoint that are mapped count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.machine import describe_machine
from easyspec.model.config import ModelConfig, load_config
from easyspec.model.decoder import Decoder
from easyspec.ops.executor import choose_executor
from easyspec.parallel.launch import torchrun_arguments
from easyspec.parallel.ranks import join_group, leave_group

RANK_COUNTS = (1, 2, 4)
_CPU = torch.device("cpu")
_MIB = 2**20
_TIMEOUT_S = 300
_SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class RankMemory:
    """Of one rank, in bytes above what the process had before: the most while loading, and when ready to run."""

    rank: int
    peak_bytes: int
    ready_bytes: int


def write_random_llama(folder: Path, **options: object) -> Path:
    """A checkpoint of small random weights in bfloat16, 500 MB unless `options` (fields of its config) say so."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_SHAPE | options))
    c = load_config(folder)
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "model.embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
        "model.norm": (c.hidden_size,),
    }
    for layer in range(c.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (c.hidden_size,),
                "post_attention_layernorm": (c.hidden_size,),
                "self_attn.q_proj": (heads, c.hidden_size),
                "self_attn.k_proj": (kv_heads, c.hidden_size),
                "self_attn.v_proj": (kv_heads, c.hidden_size),
                "self_attn.o_proj": (c.hidden_size, heads),
                "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
                "mlp.up_proj": (c.intermediate_size, c.hidden_size),
                "mlp.down_proj": (c.hidden_size, c.intermediate_size),
            }.items()
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        if len(shape) > 1
        else torch.ones(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(folder: Path, num_ranks: int) -> list[RankMemory]:
    """Load a checkpoint on so many ranks, each a process of its own; by rank. Raises CalledProcessError."""
    command = [sys.executable, *torchrun_arguments(num_ranks), "-m", "bench.rank_memory", "--measure", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_TIMEOUT_S, check=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return sorted((RankMemory(**json.loads(line)) for line in lines), key=lambda memory: memory.rank)


def replicated_bytes(config: ModelConfig) -> int:
    """What every rank holds whole."""
    return config.vocab_size * config.hidden_size * config.dtype.itemsize


def _measure_own(folder: Path) -> RankMemory:
    """Under torchrun: of this rank."""
    torch.set_num_threads(1)
    config = load_config(folder)
    ranks = join_group(_CPU)
    ranks.sum(torch.ones(1))
    executor = choose_executor("auto", _CPU, num_threads=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_bytes("VmRSS")
    decoder = Decoder(folder, config, executor, ranks=ranks)
    peak = _status_bytes("VmHWM")
    ready = _status_bytes("VmRSS")
    assert decoder.num_weight_bytes <= ready, "weights are in memory"
    leave_group()
    return RankMemory(ranks.rank, peak - before, ready - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def table(folder: Path, rank_counts: Sequence[int] = RANK_COUNTS) -> str:
    """The measurement as a Markdown table."""
    config = load_config(folder)
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    rows = [
        f"A checkpoint of {file_bytes / _MIB:.0f} MiB in {str(config.dtype).removeprefix('torch.')}, of which "
        f"{replicated_bytes(config) / _MIB:.0f} MiB (embeddings) are on every rank.",
        "",
        "| ranks | peak while loading, MiB a rank | ready to run, MiB a rank |",
        "|---|---|---|",
    ]
    for num_ranks in rank_counts:
        memories = measure(folder, num_ranks)
        peaks = " ".join(f"{memory.peak_bytes / _MIB:.0f}" for memory in memories)
        ready = " ".join(f"{memory.ready_bytes / _MIB:.0f}" for memory in memories)
        rows.append(f"| {num_ranks} | {peaks} | {ready} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rank_memory")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of random weights")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure is not None:
        print(json.dumps(asdict(_measure_own(flags.measure))), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(describe_machine(), table(flags.model or write_random_llama(Path(temporary))), sep="\n\n")


if __name__ == "__main__":
    main()
