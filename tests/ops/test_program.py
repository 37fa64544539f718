"""The contract of operations: a row's bits depend on nothing but that row, whatever runs beside it and however."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easyspec.ops.program import (
    Accumulate,
    HeadShape,
    Norm,
    ProgramWriter,
    Select,
    SumOverRanks,
    padded_width,
    sizes,
)
from tests.model.passes import Session, random_tree
from tests.ops.small_model import EXECUTOR_NAMES, FORMATS, Options, SmallModel, executor_of

NUM_TOKENS = 540  # two borders of attention spans: 256 and 512
BORDERS = (16, 256, 512)
KINDS = {
    "plain": Options(),
    "one KV head, biases": Options(HeadShape(3, 1, 20), has_biases=True, kv_dtype=torch.bfloat16),
    "window": Options(window=300, kv_dtype=torch.float16),
    "short window, sinks": Options(HeadShape(4, 4, 8), window=21, has_sinks=True),
    "soft cap, head norms": Options(HeadShape(2, 1, 24), 90, 66, soft_cap=3.0, has_head_norms=True),
    "window, cap, sinks": Options(HeadShape(8, 2, 16), window=255, soft_cap=5.0, has_sinks=True),
}
SEARCH: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@functools.cache
def model_of(executor: str, format_name: str, kind: str, num_threads: int) -> SmallModel:
    return SmallModel(executor_of(executor, num_threads), format_name, KINDS[kind])


@functools.cache
def text_of(kind: str) -> list[int]:
    generator = random.Random(1)
    return [generator.randrange(KINDS[kind].vocab_size) for _ in range(NUM_TOKENS)]


@functools.cache
def expected_of(executor: str, format_name: str, kind: str) -> torch.Tensor:
    """Logits of the whole text as one prompt, by one thread."""
    model = model_of(executor, format_name, kind, 1)
    session = Session(model.memory)
    (logits,) = model.run(session.chain(text_of(kind)))
    session.close()
    return logits


def near_borders() -> st.SearchStrategy[int]:
    """Lengths of a text, most of them near the border of a span."""
    near = st.builds(lambda border, off: border + off, st.sampled_from(BORDERS), st.integers(-9, 9))
    return near | st.integers(1, NUM_TOKENS - 30)


@pytest.fixture(scope="module", params=EXECUTOR_NAMES)
def executor(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=FORMATS)
def format_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def drawn_model(data: st.DataObject, executor: str, format_name: str) -> tuple[SmallModel, list[int], torch.Tensor]:
    """Some model of the format by one or two threads, its text, and what the text comes to."""
    kind = data.draw(st.sampled_from([*KINDS]))
    num_threads = 1 if executor == "reference" else data.draw(st.sampled_from([1, 2]))
    model = model_of(executor, format_name, kind, num_threads)
    return model, text_of(kind), expected_of(executor, format_name, kind)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    assert actual.isfinite().all(), where
    assert torch.equal(actual, expected), where


def check_chunks(data: st.DataObject, executor: str, format_name: str) -> None:
    """A text read in chunks of 1 to 300 rows, up to 63 rows of other texts before and behind."""
    model, text, expected = drawn_model(data, executor, format_name)
    start = data.draw(near_borders())
    session = Session(model.memory)
    model.run(session.chain(text[:start]))
    for size in data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 4, 7, 8, 9, 16, 33, 300]), min_size=1, max_size=6)):
        begin = session.slots.num_cached
        chunk = text[begin : begin + size]
        others = [Session(model.memory) for _ in range(data.draw(st.integers(0, 3)))]
        segments = [other.chain(text[-data.draw(st.integers(1, 21)) :]) for other in others]
        place = data.draw(st.integers(0, len(others)))
        if chunk:
            segments.insert(place, session.chain(chunk))
            logits = model.run(*segments)[place]
            assert_same_bits(logits, expected[begin : begin + size], f"rows {begin} to {begin + size}")
        for other in others:
            other.close()
    session.close()


def check_tree(data: st.DataObject, executor: str, format_name: str) -> None:
    """The text's next tokens as a path among up to 63 nodes, beside another tree; then the same rows committed."""
    model, text, expected = drawn_model(data, executor, format_name)
    length, seed = data.draw(near_borders()), data.draw(st.integers(0, 999))
    num_nodes = data.draw(st.integers(1, 63))
    path = text[length + 1 : length + 1 + data.draw(st.integers(1, min(20, num_nodes)))]
    tree, rows = random_tree(num_nodes, max(text) + 1, seed, path)
    session, other = Session(model.memory), Session(model.memory)
    model.run(session.chain(text[:length]), other.chain(text[: seed % 70 + 1]))
    segments = [session.tree(text[length], tree)]
    if is_beside := data.draw(st.booleans()):
        segments.insert(0, other.tree(text[0], random_tree(seed % 30 + 1, max(text) + 1, seed + 1)[0]))
    logits = model.run(*segments)[-1]
    wanted = expected[length : length + len(rows)]
    assert_same_bits(logits[rows], wanted, f"tree at {length}")
    session.drop_tree()
    (logits,) = model.run(session.chain(text[length : length + len(rows)]))
    assert_same_bits(logits, wanted, f"committed at {length}")
    if is_beside:
        other.drop_tree()
    session.close()
    other.close()


def check_slots(data: st.DataObject, executor: str, format_name: str) -> None:
    """Memory that other sessions have given back lies scattered; positions decide, not slots."""
    model, text, expected = drawn_model(data, executor, format_name)
    generator = data.draw(st.randoms(use_true_random=False))
    taken = model.memory.allocate(NUM_TOKENS * 2)
    generator.shuffle(taken)
    model.memory.free(taken)
    length = data.draw(near_borders())
    session = Session(model.memory)
    (logits,) = model.run(session.chain(text[:length]))
    assert_same_bits(logits, expected[:length], f"{length} rows")
    session.close()


@settings(max_examples=4, **SEARCH)
@given(data=st.data())
def test_any_chunks_beside_any_number_of_rows(data: st.DataObject, executor: str, format_name: str) -> None:
    check_chunks(data, executor, format_name)


@settings(max_examples=4, **SEARCH)
@given(data=st.data())
def test_a_path_of_a_tree_is_the_text(data: st.DataObject, executor: str, format_name: str) -> None:
    check_tree(data, executor, format_name)


@settings(max_examples=2, **SEARCH)
@given(data=st.data())
def test_slots_may_lie_anywhere(data: st.DataObject, executor: str, format_name: str) -> None:
    check_slots(data, executor, format_name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows(executor: str, kind: str) -> None:
    """1 to 64 rows across the border of a span: kernels take rows in blocks of any size."""
    model, text, expected = (
        model_of(executor, "float32", kind, 1),
        text_of(kind),
        expected_of(executor, "float32", kind),
    )
    session = Session(model.memory)
    model.run(session.chain(text[:230]))
    for count in range(1, 65):
        (logits,) = model.run(session.chain(text[230 : 230 + count]))
        assert_same_bits(logits, expected[230 : 230 + count], f"{count} rows")
        session.slots.truncate(230)
    session.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=150, **SEARCH)
@given(data=st.data())
def test_a_soak(data: st.DataObject, executor: str, format_name: str) -> None:
    """Chunks, trees and scattered slots mixed, many times over."""
    data.draw(st.sampled_from((check_chunks, check_tree, check_slots)))(data, executor, format_name)


def test_stretches_end_at_collectives() -> None:
    writer = ProgramWriter()
    a, b = writer.buffer(8), writer.buffer(8)
    norm, total = Norm(a, b, torch.ones(8), 1e-5), SumOverRanks((b,))
    select, added = Select(a, b), Accumulate(a, (b,), (a,))
    writer.add(norm, select, total, total, added)
    assert writer.stretches() == [[norm, select], total, total, [added]]


def test_buffers_are_filled_up_to_groups_of_32() -> None:
    writer = ProgramWriter()
    writer.buffer(33)
    writer.buffer(32, is_selected=True)
    assert [padded_width(width) for width in (1, 32, 33)] == [32, 32, 64]
    assert sizes(writer.buffers, num_rows=5, num_selected=2) == [5 * 64, 2 * 32]
