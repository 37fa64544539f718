"""Two base models behind one drafter, as they are run: four processes, each model's text that of its plain decoding."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from easyspec.cli.clients import GenerateFlags
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, StackSettings
from easyspec.errors import UnavailableError, UnknownModelError
from easyspec.v1 import generation_pb2
from tests.end_to_end.test_processes import FLAGS, GREEDY, SAMPLED, Running, running
from tests.fakes.drafts import write_draft

SECOND = "second"
BASE_SMALL = DEFAULT_BASE.with_name("base-small")
States = generation_pb2.GetServerInfoResponse


@pytest.fixture(scope="session")
def second_folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Another base model of the same vocabulary, near enough to the first for the same draft to be of use."""
    return write_draft(tmp_path_factory.mktemp("second"), base_folder, noise=0.15)


async def check_both_at_once(pair: Running) -> list[str]:
    """Drafted requests to both models, at the same time and twice over, say what plain ones do; returns the texts."""
    names = [served.name for served in (await pair.client.info()).served_models]
    requests = [replace(flags, model=name) for name in names for flags in (GREEDY, SAMPLED)]
    plain = [(await pair.generate(replace(request, is_drafting=False)))[0] for request in requests]
    assert len(set(plain)) == len(requests), "both models say the same: nothing would be shown"
    drafted = await asyncio.gather(*(pair.generate(request) for request in requests * 2))
    assert [text for text, _ in drafted] == plain * 2
    accepted = [completion.speculation.num_accepted_tokens for _, completion in drafted]
    assert min(accepted) > 0
    return plain


async def until_verifier_is(pair: Running, name: str, state: int) -> None:
    async with asyncio.timeout(20):
        while True:
            served = {served.name: served.verifier_state for served in (await pair.client.info()).served_models}
            if served[name] == state:
                return
            await asyncio.sleep(0.05)


async def test_two_models_share_a_drafter_and_neither_takes_the_other_down(
    base_folder: Path, draft_folder: Path, second_folder: Path
) -> None:
    settings = StackSettings(base_folder, draft_folder, also={SECOND: second_folder}, flags=FLAGS)
    async with running(settings) as pair:
        assert len(pair.stack.processes) == 4
        greedy, *_ = await check_both_at_once(pair)
        with pytest.raises(UnknownModelError, match=SECOND):
            await pair.generate(replace(GREEDY, model="third"))
        verifier = pair.stack.also[SECOND]
        verifier.kill()
        await verifier.wait()
        await until_verifier_is(pair, SECOND, States.PEER_STATE_UNREACHABLE)
        text, completion = await pair.generate(GREEDY)
        assert text == greedy
        assert completion.speculation.num_draft_tokens > 0
        with pytest.raises(UnavailableError):
            await pair.generate(replace(GREEDY, model=SECOND))


@pytest.mark.skipif(
    not all((folder / "config.json").exists() for folder in (DEFAULT_BASE, BASE_SMALL, DEFAULT_DRAFT)),
    reason="the bundled models have not been trained here",
)
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_bundled_bases_share_the_bundled_draft() -> None:
    """In their default types, with threads as they come."""
    async with running(StackSettings(also={BASE_SMALL.name: BASE_SMALL}, flags={"gateway": FLAGS["gateway"]})) as pair:
        await check_both_at_once(pair)
        long: GenerateFlags = replace(SAMPLED, stop=replace(SAMPLED.stop, max_tokens=150), model=BASE_SMALL.name)
        plain, _ = await pair.generate(replace(long, is_drafting=False))
        killed, completion = await pair.generate(long, kill_after=4)
        assert killed == plain
        assert completion.speculation.num_drafter_failures > 0
