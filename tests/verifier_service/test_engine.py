"""The engine's door: bad requests, full memory, faults, and checkpoints that do not load."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.errors import (
    CapacityError,
    ConfigurationError,
    InvalidRequestError,
    InvalidTreeError,
    PromptTooLongError,
    StalePositionError,
    UnavailableError,
    UnknownModelError,
)
from easyspec.model.decoder import Decoder
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.engine_driver import generate
from tests.fakes.checkpoints import VOCAB_SIZE, change_config, change_tensor
from tests.fakes.servers import eventually
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

PROMPT = (3, 1, 4, 1, 5)
GOOD = OpenVerification(PROMPT, SamplingParameters(seed=1, temperature=0.5), StopConditions(6, ignore_eos=True))
NAN = math.nan


def settings(folder: Path, **changes: Any) -> VerifierSettings:
    return VerifierSettings(model=str(folder), num_threads=1, **({"num_kv_slots": 1024} | changes))


@pytest.fixture
async def engine(base_folder: Path) -> AsyncIterator[VerifierEngine]:
    """One with room for few."""
    engine = VerifierEngine(settings(base_folder, num_kv_slots=512, max_tree_nodes=16))
    await engine.start()
    yield engine
    await engine.stop()


def sampled(**changes: Any) -> OpenVerification:
    return replace(GOOD, sampling=replace(GOOD.sampling, **changes))


BAD_OPENINGS: list[tuple[OpenVerification, type[Exception], str, str]] = [
    (replace(GOOD, prompt_token_ids=()), InvalidRequestError, "prompt_token_ids", "[]"),
    (replace(GOOD, prompt_token_ids=(1, VOCAB_SIZE)), InvalidRequestError, "prompt_token_ids", str(VOCAB_SIZE)),
    (replace(GOOD, prompt_token_ids=(1, -1)), InvalidRequestError, "prompt_token_ids", "-1"),
    (replace(GOOD, prompt_token_ids=(1,) * 256), PromptTooLongError, "prompt_token_ids", "256 tokens"),
    (replace(GOOD, output_token_ids=(7, 999)), InvalidRequestError, "output_token_ids", "999"),
    (replace(GOOD, output_token_ids=(7,) * 6), InvalidRequestError, "output_token_ids", "6 tokens"),
    (replace(GOOD, stop=StopConditions(0)), InvalidRequestError, "stop.max_tokens", "0"),
    (replace(GOOD, stop=StopConditions(5, frozenset({999}))), InvalidRequestError, "stop.stop_token_ids", "999"),
    (sampled(temperature=-0.5), InvalidRequestError, "sampling.temperature", "-0.5"),
    (sampled(temperature=NAN), InvalidRequestError, "sampling.temperature", "nan"),
    (sampled(temperature=math.inf), InvalidRequestError, "sampling.temperature", "inf"),
    (sampled(top_k=0), InvalidRequestError, "sampling.top_k", "0"),
    (sampled(top_p=NAN), InvalidRequestError, "sampling.top_p", "nan"),
    (sampled(min_p=1.5), InvalidRequestError, "sampling.min_p", "1.5"),
    (sampled(repetition_penalty=0.0), InvalidRequestError, "sampling.repetition_penalty", "0.0"),
    (sampled(presence_penalty=NAN), InvalidRequestError, "sampling.presence_penalty", "nan"),
    (sampled(frequency_penalty=-2.5), InvalidRequestError, "sampling.frequency_penalty", "-2.5"),
    (sampled(logit_bias={VOCAB_SIZE: 1.0}), InvalidRequestError, "sampling.logit_bias token id", str(VOCAB_SIZE)),
    (sampled(logit_bias={3: NAN}), InvalidRequestError, "sampling.logit_bias[3]", "nan"),
]


@pytest.mark.parametrize(("request_", "error", "field", "value"), BAD_OPENINGS)
async def test_a_bad_opening_names_field_and_value_and_holds_nothing(
    verifier: VerifierEngine, request_: OpenVerification, error: type[Exception], field: str, value: str
) -> None:
    before = verifier.kv_usage()
    with pytest.raises(InvalidRequestError) as refusal:
        await verifier.open(request_)
    assert type(refusal.value) is error
    assert refusal.value.field == field
    assert value in repr(refusal.value.value)
    assert verifier.kv_usage() == before


async def test_an_unknown_model_is_named(verifier: VerifierEngine) -> None:
    name = verifier.model_info.name
    with pytest.raises(UnknownModelError, match=f"'gpt-9' is not served here; served: {name}"):
        await verifier.open(replace(GOOD, model="gpt-9"))
    verifier.close(await verifier.open(replace(GOOD, model=name)))


BAD_TREES = [
    (TokenTree((1, 2), (0,)), "tree.parent_rows", "1 entries"),
    (TokenTree((1, 2), (0, 2)), "tree.parent_rows[1]", "2"),
    (TokenTree((1, 2), (1, 0)), "tree.parent_rows[0]", "1"),
    (TokenTree((1, VOCAB_SIZE), (0, 0)), "tree.token_ids[1]", str(VOCAB_SIZE)),
    (TokenTree((7, 7), (0, 0)), "tree.token_ids[1]", "7"),
    (TokenTree(tuple(range(17)), (0,) * 17), "tree.token_ids", "17 nodes"),
]


@pytest.mark.parametrize(("tree", "field", "value"), BAD_TREES)
async def test_what_is_no_tree_changes_nothing(engine: VerifierEngine, tree: TokenTree, field: str, value: str) -> None:
    expected = (await generate(engine, GOOD)).token_ids
    session_id = await engine.open(GOOD)
    said = list((await engine.verify(session_id, 5, EMPTY_TREE))[0].token_ids)
    with pytest.raises(InvalidTreeError) as refusal:
        await engine.verify(session_id, 6, tree)
    assert refusal.value.field == field
    assert value in repr(refusal.value.value)
    for base_length in range(6, 11):
        said += (await engine.verify(session_id, base_length, EMPTY_TREE))[0].token_ids
    assert tuple(said) == expected
    engine.close(session_id)


async def test_a_stale_position_changes_nothing(engine: VerifierEngine) -> None:
    expected = (await generate(engine, GOOD)).token_ids
    session_id = await engine.open(GOOD)
    said: list[int] = []
    for base_length in range(5, 11):
        for stale in (base_length - 1, base_length + 1, 0):
            with pytest.raises(StalePositionError, match=f"is {stale}; the session stands at {base_length}"):
                await engine.verify(session_id, stale, TokenTree((9,), (0,)))
        said += (await engine.verify(session_id, base_length, EMPTY_TREE))[0].token_ids
    assert tuple(said) == expected
    with pytest.raises(InvalidRequestError, match="an open session that has not finished"):
        await engine.verify(session_id, 11, EMPTY_TREE)
    engine.close(session_id)
    with pytest.raises(InvalidRequestError, match="an open session"):
        await engine.verify(session_id, 11, EMPTY_TREE)


async def test_two_trees_at_once_for_one_session_are_refused(engine: VerifierEngine) -> None:
    session_id = await engine.open(GOOD)
    first, second = (
        asyncio.ensure_future(engine.verify(session_id, 5, EMPTY_TREE)),
        asyncio.ensure_future(engine.verify(session_id, 5, EMPTY_TREE)),
    )
    with pytest.raises(StalePositionError):
        await asyncio.wait_for(second, 5)
    assert (await first)[0].token_ids == (await generate(engine, GOOD)).token_ids[:1]
    engine.close(session_id)


async def test_slots_are_taken_as_a_session_grows_shared_and_given_back(engine: VerifierEngine) -> None:
    long = replace(GOOD, stop=StopConditions(100, ignore_eos=True))
    session_ids = [await engine.open(long) for _ in range(4)]
    assert engine.kv_usage().num_used_slots == 0
    verdicts = await asyncio.gather(
        *(engine.verify(session_id, 5, TokenTree((1, 2, 3), (0, 0, 1))) for session_id in session_ids)
    )
    assert len({verdict.token_ids for verdict, _ in verdicts}) == 1
    usage = engine.kv_usage()
    assert usage.num_sessions == 4
    num_own = 1 + verdicts[0][0].num_accepted  # the root, which is always computed, and what follows it
    assert 5 <= usage.num_used_slots <= 4 + 4 * num_own  # nodes that were not accepted have been given back
    assert usage.num_prefix_query_tokens == 4 * 4
    assert usage.num_prefix_hit_tokens == 3 * 4
    for session_id in [*session_ids, session_ids[0]]:
        engine.close(session_id)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    usage = engine.kv_usage()
    assert (usage.num_used_slots, usage.num_preemptions) == (0, 0)
    assert usage.num_cached_slots >= 5
    await generate(engine, long)


async def test_without_sharing_every_prompt_is_computed_and_says_the_same(base_folder: Path) -> None:
    said = []
    for share_prefixes in (True, False):
        engine = VerifierEngine(settings(base_folder, share_prefixes=share_prefixes))
        await engine.start()
        said.append([(await generate(engine, GOOD)).token_ids for _ in range(2)])
        usage = engine.kv_usage()
        assert (usage.num_prefix_hit_tokens > 0) == (usage.num_cached_slots > 0) == share_prefixes
        await engine.stop()
    assert said[0] == said[1]
    assert len({*said[0], *said[1]}) == 1


async def test_who_asks_for_the_prompts_logprobs_computes_the_prompt(engine: VerifierEngine) -> None:
    await generate(engine, GOOD)
    before = engine.kv_usage().num_prefix_hit_tokens
    session_id = await engine.open(replace(GOOD, num_top_logprobs=0, prompt_logprobs=True))
    _, timings = await engine.verify(session_id, 5, EMPTY_TREE)
    assert timings.num_batch_rows == 5
    assert engine.kv_usage().num_prefix_hit_tokens == before
    engine.close(session_id)


def hungry(seed: int, max_tokens: int = 150) -> OpenVerification:
    prompt = tuple((seed * 7 + i * (seed + 3)) % VOCAB_SIZE for i in range(60))
    return OpenVerification(
        prompt, SamplingParameters(seed, temperature=0.8), StopConditions(max_tokens, ignore_eos=True)
    )


async def test_when_memory_runs_out_the_younger_give_way_and_all_say_what_they_say_alone(
    base_folder: Path, verifier: VerifierEngine
) -> None:
    """Four sessions that come to 210 tokens each, in 512 slots."""
    alone = [(await generate(verifier, hungry(seed))).said for seed in range(4)]
    engine = VerifierEngine(settings(base_folder, num_kv_slots=512, max_tree_nodes=16, admission_timeout_s=60))
    await engine.start()
    together = await asyncio.gather(*(generate(engine, hungry(seed)) for seed in range(4)))
    assert [output.said for output in together] == alone
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    usage = engine.kv_usage()
    assert usage.num_preemptions > 0
    assert usage.num_used_slots == 0
    await engine.stop()


async def fill(engine: VerifierEngine, num_sessions: int) -> list[int]:
    """Sessions that hold their prompts of 60 tokens."""
    session_ids = [await engine.open(hungry(seed)) for seed in range(num_sessions)]
    await asyncio.gather(*(engine.verify(session_id, 60, EMPTY_TREE) for session_id in session_ids))
    return session_ids


@pytest.fixture
async def crowded(base_folder: Path) -> AsyncIterator[VerifierEngine]:
    """One in which two sessions of 60 tokens leave no room for a third, and one may wait, half a second."""
    changes = {"num_kv_slots": 200, "max_tree_nodes": 16, "max_waiting_sessions": 1, "admission_timeout_s": 0.5}
    engine = VerifierEngine(settings(base_folder, **changes))
    await engine.start()
    yield engine
    await engine.stop()


async def test_a_full_engine_lets_few_wait_for_a_while_and_refuses_the_others_at_once(crowded: VerifierEngine) -> None:
    session_ids = await fill(crowded, 2)
    clock = asyncio.get_running_loop().time
    started_s = clock()
    waits = asyncio.ensure_future(crowded.open(hungry(2)))
    await asyncio.sleep(0)
    with pytest.raises(
        CapacityError, match="KV memory is full: 80 of 200 token slots free, 1 sessions waiting"
    ) as full:
        await crowded.open(hungry(3))
    assert full.value.retry_after_s == 0.5
    assert clock() - started_s < 0.4
    with pytest.raises(CapacityError, match="KV memory was full for"):
        await waits
    assert clock() - started_s >= 0.5
    assert crowded.kv_usage().num_sessions == 2
    waits = asyncio.ensure_future(crowded.open(hungry(4)))
    await asyncio.sleep(0.05)
    crowded.close(session_ids[0])
    session_ids[0] = await waits
    assert (await crowded.verify(session_ids[0], 60, EMPTY_TREE))[0].base_length == 60
    for session_id in session_ids:
        crowded.close(session_id)
    await eventually(lambda: crowded.kv_usage().num_sessions == 0)
    assert crowded.kv_usage().num_used_slots == 0


async def test_who_gives_up_waiting_leaves_the_place_in_the_queue_and_holds_nothing(crowded: VerifierEngine) -> None:
    session_ids = await fill(crowded, 2)
    for seed in range(5, 10):
        waits = asyncio.ensure_future(crowded.open(hungry(seed)))
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
    for session_id in session_ids:
        crowded.close(session_id)
    await eventually(lambda: crowded.kv_usage().num_sessions == 0)
    assert crowded.kv_usage().num_used_slots == 0
    session_id = await crowded.open(hungry(10))
    assert crowded.kv_usage().num_sessions == 1
    crowded.close(session_id)


async def test_closing_a_preempted_session_frees_everything(crowded: VerifierEngine) -> None:
    old, young = await fill(crowded, 2)
    base_length = 61
    while crowded.kv_usage().num_preemptions == 0:
        verdict, _ = await crowded.verify(old, base_length, EMPTY_TREE)
        base_length += len(verdict.token_ids)
    waiting = asyncio.ensure_future(crowded.verify(young, 61, EMPTY_TREE))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    crowded.close(young)
    await crowded.verify(old, base_length, EMPTY_TREE)
    waiting.cancel()
    crowded.close(old)
    await eventually(lambda: crowded.kv_usage().num_sessions == 0)
    assert crowded.kv_usage().num_used_slots == 0


async def test_stopping_refuses_who_waits_for_memory(crowded: VerifierEngine) -> None:
    await fill(crowded, 2)
    waits = asyncio.ensure_future(crowded.open(hungry(2)))
    await asyncio.sleep(0)
    await crowded.stop()
    with pytest.raises(UnavailableError):
        await waits


async def test_what_can_never_fit_is_refused_at_once(base_folder: Path) -> None:
    """The context is as long as the memory: 100 slots, of which a tree takes 16."""
    engine = VerifierEngine(settings(base_folder, num_kv_slots=100, max_tree_nodes=16))
    await engine.start()
    assert engine.model_info.max_model_len == 84
    with pytest.raises(PromptTooLongError, match="'84 tokens'; allowed: below 84"):
        await engine.open(replace(GOOD, prompt_token_ids=(1,) * 84))
    output = await generate(engine, replace(GOOD, prompt_token_ids=(1,) * 83))
    assert len(output.token_ids) == 1
    await engine.stop()


@pytest.mark.parametrize("prompt_length", [5, 200])
async def test_closing_while_a_verdict_is_under_way_frees_everything(
    engine: VerifierEngine, prompt_length: int
) -> None:
    asked = replace(GOOD, prompt_token_ids=(1,) * prompt_length)
    session_id = await engine.open(asked)
    verifying = asyncio.ensure_future(engine.verify(session_id, prompt_length, TokenTree((1, 2), (0, 0))))
    await asyncio.sleep(0)
    verifying.cancel()
    engine.close(session_id)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    assert engine.kv_usage().num_used_slots == 0
    assert await generate(engine, GOOD)


class Fault:
    """Breaks the next passes of every decoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_passes: int = 1) -> None:
        self.num_passes = num_passes
        forward = Decoder.forward

        def faulty(decoder: Decoder, *arguments: Any, **keywords: Any) -> torch.Tensor:
            if self.num_passes > 0:
                self.num_passes -= 1
                raise RuntimeError("device lost")
            return forward(decoder, *arguments, **keywords)

        monkeypatch.setattr(Decoder, "forward", faulty)


async def test_a_fault_fails_the_steps_sessions_leaks_nothing_and_the_engine_lives_on(
    engine: VerifierEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (await generate(engine, GOOD)).token_ids
    idle, hit = await engine.open(GOOD), await engine.open(GOOD)
    await engine.verify(idle, 5, EMPTY_TREE)
    await engine.verify(hit, 5, EMPTY_TREE)
    Fault(monkeypatch)
    with pytest.raises(RuntimeError, match="device lost"):
        await engine.verify(hit, 6, TokenTree((1, 2, 3), (0, 0, 0)))
    with pytest.raises(InvalidRequestError, match="has not finished"):
        await engine.verify(hit, 6, EMPTY_TREE)
    assert (await engine.verify(idle, 6, EMPTY_TREE))[0].token_ids == expected[1:2]
    assert (await generate(engine, GOOD)).token_ids == expected
    engine.close(idle)
    engine.close(hit)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    assert engine.kv_usage().num_used_slots == 0


async def test_stopping_refuses_who_waits(base_folder: Path) -> None:
    engine = VerifierEngine(settings(base_folder))
    await engine.start()
    session_id = await engine.open(GOOD)
    await engine.stop()
    with pytest.raises(UnavailableError):
        await engine.verify(session_id, 5, EMPTY_TREE)
    with pytest.raises(UnavailableError):
        await engine.open(GOOD)
    engine.close(session_id)
    await engine.stop()


async def test_info_tells_the_model(verifier: VerifierEngine, base_folder: Path) -> None:
    info = verifier.model_info
    assert (info.vocab_size, info.max_model_len, info.num_layers) == (VOCAB_SIZE, 256, 6)
    assert (info.dtype, info.eos_token_ids, info.name) == ("float32", (0,), base_folder.name)
    assert len(info.tokenizer_fingerprint) == 64


async def refusal(folder: Path, **changes: Any) -> str:
    engine = VerifierEngine(settings(folder, **changes))
    with pytest.raises(ConfigurationError) as error:
        await engine.start()
    await engine.stop()
    return str(error.value)


@pytest.fixture
def copy(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


async def test_a_missing_or_corrupt_checkpoint_is_a_start_up_error_that_names_it(copy: Path) -> None:
    assert "nowhere" in await refusal(copy / "nowhere")
    (copy / "tokenizer.json").rename(copy / "kept")
    assert str(copy / "tokenizer.json") in await refusal(copy)
    (copy / "tokenizer.json").write_text("[]")
    assert "is not a tokenizer" in await refusal(copy)
    (copy / "kept").rename(copy / "tokenizer.json")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert str(copy / "model.safetensors") in await refusal(copy)
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    assert str(copy / "model.safetensors") in await refusal(copy)
    (copy / "model.safetensors").unlink()
    assert str(copy / "model.safetensors") in await refusal(copy)
    (copy / "config.json").write_text("{")
    assert str(copy) in await refusal(copy)
    (copy / "config.json").unlink()
    assert str(copy) in await refusal(copy)


async def test_a_checkpoint_that_lacks_a_tensor_or_has_another_shape_is_refused(copy: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    change_tensor(copy, name, torch.zeros(3, 3))
    assert f"'{name}'" in (message := await refusal(copy))
    assert "(3, 3)" in message
    change_tensor(copy, name, None)
    assert f"no tensor '{name}'" in await refusal(copy)
    config = json.loads((copy / "config.json").read_text())
    change_config(copy, **(config | {"model_type": "gpt2"}))
    assert "model_type is 'gpt2'" in await refusal(copy)


async def test_settings_that_do_not_fit_the_model_are_refused(base_folder: Path) -> None:
    assert "num_kv_slots is 17; allowed: at least 18" in await refusal(base_folder, max_tree_nodes=16, num_kv_slots=17)
    too_long = await refusal(base_folder, max_tree_nodes=16, num_kv_slots=100, max_model_len=90)
    assert "num_kv_slots is 100; allowed: at least 106" in too_long
