from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from easyspec import __version__
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.cli.conftest import CHECKOUT, Command
from tests.fakes.services import TOY_TEXT, ToyLanguage, running, running_pair

GREEN, YELLOW = "\x1b[32m", "\x1b[1;33m"


@pytest.fixture
async def gateway(checkpoint: Path) -> AsyncIterator[str]:
    """Address of a gateway with fakes behind it."""
    tokenizer = Tokenizer.load(checkpoint)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            tokenizer=checkpoint,
            verifier_address=pair.verifier_service.address,
            drafter_address=pair.drafter_service.address,
        )
        async with running(GatewayServer(settings)) as service:
            yield service.address


def expected_text(checkpoint: Path, num_tokens: int, prompt: str) -> str:
    tokenizer = Tokenizer.load(checkpoint)
    cycle, start = tokenizer.encode(TOY_TEXT), len(tokenizer.encode(prompt))
    return tokenizer.decode([cycle[(start + i) % len(cycle)] for i in range(num_tokens)])


@pytest.mark.parametrize("command", [[], ["generate"], ["up"], ["bench"], ["plan"]])
async def test_help_names_what_there_is(easyspec_command: Command, command: list[str]) -> None:
    ended = await easyspec_command(*command, "--help")
    assert ended.code == 0
    assert "Usage" in ended.stdout
    if command == ["generate"]:
        assert "--show-speculation" in ended.stdout


@pytest.mark.parametrize("value", ["small", "=models/base-small", "small="])
async def test_a_further_model_needs_a_name_and_a_folder(easyspec_command: Command, value: str) -> None:
    ended = await easyspec_command("up", "--also", value)
    assert ended.code == 2
    assert "--also" in ended.stderr
    assert "NAME=FOLDER" in ended.stderr


async def test_version(easyspec_command: Command) -> None:
    ended = await easyspec_command("--version")
    assert (ended.code, ended.stdout) == (0, f"easyspec {__version__}\n")


def test_the_command_starts_without_torch_and_transformers() -> None:
    code = "import sys, easyspec.cli.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], ["sampling.temperature", "-1.0", "0.0 to 100.0"]),
        (["--temperature", "nan"], ["sampling.temperature", "nan"]),
        (["--max-tokens", "0"], ["stop.max_tokens", "0", "at least 1"]),
        (["--num-nodes", "0"], ["budget.num_nodes", "0"]),
        (["--layer-parallel-size", "0"], ["layer_parallel_size", "0"]),
        (["--seed", "-1"], ["sampling.seed", "-1"]),
        (["--gateway", "nowhere"], ["--gateway", "nowhere", "host:port"]),
        (["--base", "/no/such/folder"], ["model", "/no/such/folder", "neither a folder"]),
    ],
)
async def test_bad_input_is_one_line_and_exit_code_2(
    easyspec_command: Command, flags: list[str], words: list[str]
) -> None:
    ended = await easyspec_command("generate", "x", *flags)
    assert ended.code == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr


async def test_an_unknown_flag_is_refused(easyspec_command: Command) -> None:
    ended = await easyspec_command("generate", "x", "--warp-speed", "9")
    assert ended.code == 2
    assert "--warp-speed" in ended.stderr


async def test_a_gateway_that_is_not_there_is_exit_code_1(easyspec_command: Command) -> None:
    ended = await easyspec_command("generate", "x", "--gateway", "127.0.0.1:1")
    assert ended.code == 1
    assert "127.0.0.1:1" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_the_completion_and_only_it_goes_to_stdout(
    easyspec_command: Command, gateway: str, checkpoint: Path
) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "40")
    ended = await easyspec_command("generate", "def f(n):", "--gateway", gateway, *greedy, "--seed", "5")
    assert ended.code == 0, ended.stderr
    assert ended.stdout == expected_text(checkpoint, 40, "def f(n):")
    for word in ("mean acceptance length", "acceptance rate", "length", "seed"):
        assert word in ended.stderr
    plain = await easyspec_command("generate", "def f(n):", "--gateway", gateway, *greedy, "--no-draft")
    assert plain.stdout == ended.stdout


async def test_colours_only_when_asked_and_the_same_text(
    easyspec_command: Command, gateway: str, checkpoint: Path
) -> None:
    flags = ("generate", "def f(n):", "--gateway", gateway, "--temperature", "0", "--max-tokens", "40")
    ended = await easyspec_command(*flags, "--show-speculation")
    assert GREEN in ended.stdout
    assert YELLOW in ended.stdout
    bare = ended.stdout.replace(GREEN, "").replace(YELLOW, "").replace("\x1b[0m", "")
    assert bare == expected_text(checkpoint, 40, "def f(n):")


async def test_the_speed_without_speculation_is_shown_beside(
    easyspec_command: Command, gateway: str, checkpoint: Path
) -> None:
    flags = ("generate", "def f(n):", "--gateway", gateway, "--temperature", "0", "--max-tokens", "40")
    ended = await easyspec_command(*flags, "--compare")
    assert ended.stdout == expected_text(checkpoint, 40, "def f(n):")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("without speculation")]
    assert "times as fast with it, the same tokens" in line
    assert "without speculation" not in (await easyspec_command(*flags)).stderr


async def test_stop_strings_and_a_gateways_refusal(easyspec_command: Command, gateway: str) -> None:
    flags = ("generate", "x", "--gateway", gateway, "--temperature", "0")
    ended = await easyspec_command(*flags, "--stop", "STOP")
    assert "STOP" not in ended.stdout
    assert "stop string 'STOP'" in ended.stderr
    refused = await easyspec_command(*flags, "--num-nodes", "65")
    assert refused.code == 2
    assert "budget.num_nodes is 65" in refused.stderr


async def test_plan_recommends_and_prints_json(easyspec_command: Command) -> None:
    ended = await easyspec_command("plan", "--gpus", "8", "--gpu", "h200")
    assert (ended.code, ended.stderr) == (0, "")
    assert "recommended: " in ended.stdout
    ended = await easyspec_command("plan", "--base", "models/base", "--draft", "models/draft", "--gpus", "1", "--json")
    document = json.loads(ended.stdout)
    assert document["verifier_ranks"] == 1
    assert [estimate["scheme"]["num_ranks"] for estimate in document["estimates"]]


async def test_plan_refuses_what_it_does_not_know(easyspec_command: Command) -> None:
    ended = await easyspec_command("plan", "--gpu", "abacus")
    assert (ended.code, ended.stdout) == (2, "")
    assert "gpu is 'abacus'; allowed: a100" in ended.stderr


async def test_bench_serve_measures_a_running_gateway(easyspec_command: Command, gateway: str, tmp_path: Path) -> None:
    report, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    windows = ("--turns", "1", "--window-s", "1", "--settle-s", "0.1", "--mix", "tiny")
    files = ("--json", str(report), "--plot", str(plot))
    ended = await easyspec_command("bench", "serve", "--gateway", gateway, "--concurrency", "1", "2", *windows, *files)
    assert ended.code == 0, ended.stderr
    content = json.loads(report.read_text())
    rows = content["results"]
    assert [(row["concurrency"], row["speculation"]) for row in rows] == [
        (concurrency, speculation) for concurrency in (1, 2) for speculation in ("off", "on", "auto")
    ]
    for row in rows:
        assert set(row["ttft_ms"]) == set(row["inter_token_ms"]) == {"p50", "p95", "p99"}
        assert row["tokens_per_s"] > 0
        assert row["batch_occupancy"] > 0
        assert {"mean_acceptance_length", "kv_use"} <= set(row)
    assert plot.read_bytes().startswith(b"\x89PNG")


async def test_bench_serve_without_a_gateway_fails_in_a_line(easyspec_command: Command) -> None:
    ended = await easyspec_command("bench", "serve", "--gateway", "127.0.0.1:1")
    assert ended.code == 1
    assert "Traceback" not in ended.stderr
