"""The comparison with transformers: its own ways on a real tiny pair, and figures checked by head."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console
from rich.progress import Progress

from bench.alternatives.alternatives import AlternativesSettings, EasyspecServices, complete_all, interleaved
from bench.alternatives.summary import COLUMNS, alternatives_section, summarize_alternatives
from bench.alternatives.timed_completion import Answer, DecodePhase, Maker, TimedCompletion
from bench.alternatives.transformers import TransformersGeneration
from bench.harness.clients import GatewayClient
from bench.harness.streams import Speculation, Task
from bench.harness.tables import ResultTable
from bench.harness.tasks import TASK_NAMES
from easyspec.errors import ConfigurationError, UnavailableError
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.drafts import write_draft

THEIRS, ASSISTED, LOOKUP = (Maker("transformers", way) for way in ("plain", "assisted", "prompt lookup"))
OURS, OURS_PLAIN = Maker("easyspec", "speculating"), Maker("easyspec")
SETTINGS = AlternativesSettings(num_prompts=2, max_tokens=12)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[TransformersGeneration]:
    base = write_checkpoint(tmp_path_factory.mktemp("base"), has_tokenizer=True)
    draft = write_draft(tmp_path_factory.mktemp("draft"), base, noise=0.02)
    return TransformersGeneration.all_ways(base, draft)


async def test_every_way_of_transformers_says_the_same_greedily(ways: list[TransformersGeneration]) -> None:
    task = Task("def fib(n):\n    return n\ndef fib(", 24, 0.0, 3, Speculation.OFF)
    plain, *others = [await way.complete(task) for way in ways]
    assert [way.maker for way in ways] == [THEIRS, ASSISTED, LOOKUP]
    assert plain.num_tokens == len(plain.content) == 24
    assert others == [plain, plain]


async def test_sampling_is_from_the_seed(ways: list[TransformersGeneration]) -> None:
    task = Task("x = ", 24, 1.5, 3, Speculation.OFF)
    first, again = await ways[0].complete(task), await ways[0].complete(task)
    assert first == again != await ways[0].complete(dataclasses.replace(task, seed=4))


async def test_sampling_is_over_the_whole_vocabulary(ways: list[TransformersGeneration]) -> None:
    almost_uniform = Task("x = ", 1, 1e6, 0, Speculation.OFF)
    tokens = {(await ways[0].complete(dataclasses.replace(almost_uniform, seed=seed))).content for seed in range(100)}
    assert len(tokens) > 60  # transformers' default keeps the 50 likeliest


class Canned:
    """Says its own number so often as it is asked for tokens."""

    def __init__(self, maker: Maker, number: int) -> None:
        self.maker, self.number = maker, number
        self.tasks: list[Task] = []

    async def complete(self, task: Task) -> Answer:
        self.tasks.append(task)
        return Answer((self.number,) * task.max_tokens, task.max_tokens)


async def test_everybody_gets_every_prompt_before_the_next_and_the_first_rotates() -> None:
    makers = [THEIRS, OURS, OURS_PLAIN]
    order = list(interleaved(makers, SETTINGS))
    assert len(order) == 2 * len(TASK_NAMES) * 2 * 3
    for begin in range(0, len(order), 3):
        group = order[begin : begin + 3]
        assert {each.maker for each in group} == {*makers}
        assert len({dataclasses.replace(each, maker=OURS) for each in group}) == 1
    assert [order[begin].maker for begin in (0, 18)] == [THEIRS, OURS]


def test_more_prompts_than_there_are_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ConfigurationError, match="at most"):
        list(interleaved([THEIRS], dataclasses.replace(SETTINGS, num_prompts=100_000)))


async def test_what_is_measured_is_asked_in_full_and_after_a_warm_up() -> None:
    canned = [Canned(THEIRS, 1), Canned(OURS, 2)]
    with Progress(disable=True) as progress:
        completions = await complete_all(canned, SETTINGS, progress)
    assert len(completions) == 2 * 2 * len(TASK_NAMES) * 2
    assert all(one.elapsed_s > 0 and one.answer.num_tokens == 12 for one in completions)
    assert {one.maker: one.answer.content[0] for one in completions} == {THEIRS: 1, OURS: 2}
    for each in canned:
        assert len(each.tasks) == 2 + len(TASK_NAMES) * 2 * 2
        assert {task.seed for task in each.tasks} == {7, 8}


async def test_a_gateway_that_fails_is_no_completion() -> None:
    async with GatewayClient("127.0.0.1:1", 5.0) as client:
        with pytest.raises(UnavailableError):
            await EasyspecServices(OURS, client, Speculation.AUTO).complete(Task("x", 4, 0.0, 1, Speculation.OFF))


def completion(maker: Maker, index: int, elapsed_s: float, token: int = 5) -> TimedCompletion:
    decode = None if maker.program == "transformers" else DecodePhase(8, elapsed_s / 2)
    return TimedCompletion(maker, "code", 0.0, index, Answer((token,) * 10, 10, decode), elapsed_s)


def test_speeds_are_compared_prompt_by_prompt_and_tokens_with_the_same_programs_plain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = summarize_alternatives(
        [
            *(completion(THEIRS, index, elapsed) for index, elapsed in enumerate((1.0, 2.0, 4.0))),
            *(completion(ASSISTED, index, 2.0, token=5 + index) for index in range(3)),
            *(completion(OURS_PLAIN, index, 1.0, token=6) for index in range(3)),
            *(completion(OURS, index, 0.5, token=6) for index in range(3)),
        ]
    )
    figures = {
        (one["program"], one["way"]): (one["tokens_per_s"], one["vs_transformers"], one["num_as_plain"])
        for one in results
    }
    assert figures == {
        ("transformers", "plain"): (5.0, 1.0, 3),
        ("transformers", "assisted"): (5.0, 1.0, 1),
        ("easyspec", "plain"): (10.0, 2.0, 3),
        ("easyspec", "speculating"): (20.0, 4.0, 3),
    }
    assert [one["decode_tokens_per_s"] for one in results] == [None, None, 16.0, 32.0]
    ResultTable("", COLUMNS, results).print(Console(width=120))
    assert "4.00" in capsys.readouterr().out


def test_the_best_other_is_the_fastest_way_of_any_other_program(capsys: pytest.CaptureFixture[str]) -> None:
    """Without transformers, and with a server whose plain decoding was not measured."""
    slow, fast = Maker("llama.cpp"), Maker("other", "draft")
    results = summarize_alternatives(
        [
            *(completion(slow, index, 2.0) for index in range(3)),
            *(completion(fast, index, elapsed) for index, elapsed in enumerate((1.0, 1.0, 4.0))),
            *(completion(OURS, index, 0.5) for index in range(3)),
        ]
    )
    figures = {one["program"]: (one["vs_transformers"], one["vs_best_other"], one["num_as_plain"]) for one in results}
    assert figures == {"llama.cpp": (None, 0.5, 3), "other": (None, 1.0, None), "easyspec": (None, 2.0, None)}
    ResultTable("", COLUMNS, results).print(Console(width=120))
    assert "-" in capsys.readouterr().out


def test_the_section_names_versions_and_every_row() -> None:
    results = summarize_alternatives([completion(THEIRS, 0, 1.0), completion(OURS_PLAIN, 0, 0.5)])
    section = alternatives_section(
        "alternatives-x.json",
        {
            "pair": "bundled",
            "command": "easyspec bench alternatives",
            "machine": {"cpu": "c", "cores": 2, "memory_gib": 24, "torch": "t", "python": "p"},
            "commit": "abc",
            "date": "2026-11-28",
            "weights": {},
            "transformers": "5.23.0",
            "servers": ["llama.cpp/draft"],
            "settings": {"num_prompts": 1, "max_tokens": 10, "seed": 7},
            "results": results,
        },
    )
    assert "transformers 5.23.0" in section
    assert "the server llama.cpp/draft" in section
    assert "| easyspec, plain | code | 0 | 20.0 | 32.0 | 2.00 | 2.00 | 1 of 1 |" in section
