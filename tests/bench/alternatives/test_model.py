"""`easyspec bench MODEL`: a real tiny model from the command line, and figures checked by head."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from bench.alternatives.model import summarize_model
from bench.alternatives.timed_completion import Answer, DecodePhase, Maker, TimedCompletion
from bench.harness.machine import REPOSITORY
from bench.harness.prompts import Questions
from models.evaluation_prompts import EVALUATION_KINDS, evaluation_prompts
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.drafts import write_draft

PLAIN, DRAFTED = Maker("easyspec"), Maker("easyspec", "speculating")


def completion(maker: Maker, task: str, index: int, decode_s: float, token: int = 5) -> TimedCompletion:
    answer = Answer((token,) * 9, 9, DecodePhase(8, decode_s))
    return TimedCompletion(maker, task, 0.0, index, answer, elapsed_s=100.0)


def test_figures_by_task_and_of_all() -> None:
    results = summarize_model(
        [
            completion(PLAIN, "code", 0, 1.0),
            completion(DRAFTED, "code", 0, 0.5),
            completion(DRAFTED, "chat", 0, 2.0, token=6),
            completion(PLAIN, "chat", 0, 2.0),
            completion(PLAIN, "chat", 1, 4.0),
            completion(DRAFTED, "chat", 1, 1.0),
        ]
    )
    assert [tuple(row.values()) for row in results] == [
        ("code", 0.0, 8.0, 16.0, 2.0, 0, 1),
        ("chat", 0.0, 3.0, 6.0, 2.5, 1, 2),
        ("all", 0.0, 4.0, 8.0, 2.0, 1, 3),
    ]


async def test_a_model_is_measured_by_its_path(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", max_position_embeddings=2048, std=0.2, has_tokenizer=True)
    draft = write_draft(tmp_path / "draft", base, noise=0.02)
    flags = ["--draft", str(draft), "--num-prompts", "1", "--max-tokens", "12", "--json", str(tmp_path / "report.json")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "easyspec.cli.main", "bench", str(base), *flags),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    assert "0 completions differ from plain decoding" in stdout.decode()
    report = json.loads((tmp_path / "report.json").read_text())
    kinds = [*EVALUATION_KINDS, "all"]
    assert [(row["task"], row["temperature"]) for row in report["results"]] == [
        (k, t) for t in (0.0, 0.8) for k in kinds
    ]
    assert all(row["plain_tokens_per_s"] > 0 and row["num_differing"] == 0 for row in report["results"])
    memory = report["verifier_memory"]
    assert 0 < memory["rest_mib"] < 300
    assert f"{memory['resident_mib']:.0f} MiB of its own" in stdout.decode()
    assert set(report["weights"]) == {"base", "draft"}


def test_a_model_without_a_template_is_asked_the_bare_question(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, has_tokenizer=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (prompt,) = Questions(folder).of_kind("chat", 1, seed=0)
    assert prompt in evaluation_prompts()["chat"]
