"""The two-model benchmark against a real gateway with fakes behind it, and its figures checked by hand."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from bench.harness.clients import GatewayClient
from bench.harness.streams import Outcome, Round, Speculation, Stream, Task
from bench.serving.load import Window
from bench.serving.targets import TargetSettings, measure_windows, rows_of, targets_section
from drafter_service.server import DrafterServer
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import TOY_TEXT, FakeDrafterEngine, FakeVerifierEngine, ToyLanguage, running
from tests.fakes.tiny_tokenizer import write_tokenizer
from verifier_service.server import VerifierServer

OFF, ON = Speculation.OFF, Speculation.ON
SETTINGS = TargetSettings(num_streams=2, num_turns=2, window_s=0.4, settle_s=0.1, mix="tiny", timeout_s=30.0)


async def test_both_models_are_measured_at_the_same_time_and_compared_with_themselves(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(folder)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    large, small, drafter = FakeVerifierEngine(language), FakeVerifierEngine(language), FakeDrafterEngine(language)
    large.delay_s, small.delay_s = 0.012, 0.006  # so much that what else a round takes is little beside it
    async with (
        running(VerifierServer(large)) as first,
        running(VerifierServer(small)) as second,
        running(DrafterServer(drafter)) as drafting,
    ):
        settings = GatewaySettings(
            address="127.0.0.1:0",
            tokenizer=folder,
            verifier_address=first.address,
            drafter_address=drafting.address,
            further_models={"small": {"verifier_address": second.address}},  # type: ignore[dict-item]
        )
        async with running(GatewayServer(settings)) as gateway:
            address = gateway.address
            async with GatewayClient(address, 30.0) as one, GatewayClient(address, 30.0, "small") as other:
                with Progress(disable=True) as progress:
                    turns = await measure_windows([one, other], SETTINGS, progress)
    assert [len(windows) for windows in turns] == [2, 2]
    for windows, engine in zip(turns, (large, small), strict=True):
        assert engine.num_opened > 0
        off, on = rows_of("a", 24, 2, windows)
        assert (off["vs_plain"], off["num_compared_tokens"], off["draft_share"]) == (None, 0, 0.0)
        assert on["vs_plain"] is not None
        assert on["vs_plain"] > 1
        assert len(on["vs_plain_by_turn"]) == 2
        assert on["num_compared_tokens"] > 0
        assert on["num_differing"] == on["num_failed"] == 0
    for index in range(2):
        for speculation in (OFF, ON):
            one_window, other_window = turns[0][index][speculation], turns[1][index][speculation]
            shared_s = min(one_window.end_s, other_window.end_s) - max(one_window.start_s, other_window.start_s)
            assert shared_s > 0.8 * SETTINGS.window_s


def window(speculation: Speculation, token_ids: list[list[int]]) -> Window:
    """A window of a second in which each stream said so much, at once."""
    task = Task("x", 4, 0.0, 0, speculation)
    streams = [
        Stream(task, index, 0.0, 1.0, Outcome.CUT, [Round(0.5, len(said), 0, 0, 1, 1)], said)
        for index, said in enumerate(token_ids)
    ]
    return Window(speculation, 0.0, 1.0, streams)


def test_what_both_came_to_say_must_be_the_same() -> None:
    turn = {OFF: window(OFF, [[1, 2], [5, 6, 7]]), ON: window(ON, [[1, 2, 3, 4], [5, 9, 7], [8]])}
    off, on = rows_of("a", 24, 2, [turn])
    assert (off["tokens_per_s"], on["tokens_per_s"]) == (5, 8)
    assert on["vs_plain"] == 8 / 5
    assert (on["num_compared_tokens"], on["num_differing"]) == (5, 1)
    report = {
        "command": "easyspec bench targets",
        "pair": "bundled",
        "machine": {"cpu": "c", "cores": 2, "memory_gib": 4, "torch": "2", "python": "3"},
        "commit": "abc",
        "date": "2026-01-01",
        "settings": vars(SETTINGS),
        "results": [on],
    }
    assert "| a | 24 | on | 8.0 | 1.60 | 1.60 |" in targets_section("targets-bundled.json", report)
