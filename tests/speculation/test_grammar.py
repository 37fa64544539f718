"""Grammars are followed token by token; whatever cannot be followed is an error of its sender alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from easyspec.errors import CapacityError, InvalidRequestError
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compilation import GrammarVocabulary
from easyspec.speculation.grammar_compiler import CompilerLimits, GrammarCompiler
from easyspec.speculation.grammar_sandbox import GrammarSandbox
from easyspec.speculation.grammar_trial import TrialLimits
from easyspec.speculation.parameters import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, Thinking
from tests.fakes.processes import assert_none_left_with, processes_with
from tests.fakes.tiny_tokenizer import write_tokenizer

VOCAB_SIZE = 345  # padded: the tokenizer has 340 entries at most
EOS = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE - 5)


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[GrammarCompiler]:
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (EOS,), CompilerLimits(timeout_s=60.0))) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def backend(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def lark(text: str) -> Grammar:
    return Grammar(GrammarKind.LARK, text)


def schema(content: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, content if isinstance(content, str) else json.dumps(content))


def allowed(state: GrammarState) -> set[int]:
    bits = state.allowed_bits()
    assert len(bits) == (VOCAB_SIZE + 7) // 8
    return {token_id for token_id in range(8 * len(bits)) if bits[token_id // 8] >> (token_id % 8) & 1}


def texts(backend: Tokenizer, token_ids: Sequence[int] | set[int]) -> set[str]:
    return {backend.decode([token_id], skip_special_tokens=False) for token_id in token_ids}


def follows(state: GrammarState, token_ids: Sequence[int]) -> bool:
    return all(token_id in allowed(state) and state.advance(token_id) for token_id in token_ids)


async def test_allowed_is_what_can_still_be_completed(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    state = GrammarState(await compiler.compile(regex("(return|range)s?")), ignore_eos=False)
    first = texts(backend, allowed(state))
    assert {"r", "ra"} <= first <= {"return"[:n] for n in range(1, 7)} | {"range"[:n] for n in range(1, 6)}
    assert not state.advance(backend.token_to_id("x"))
    assert texts(backend, allowed(state)) == first  # a refused token changes nothing
    assert follows(state, backend.encode("return").ids)
    assert allowed(state) == {backend.token_to_id("s"), EOS}
    assert follows(state, [backend.token_to_id("s")])
    assert allowed(state) == {EOS}


async def test_with_ignore_eos_the_output_goes_on_while_it_can(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    state = GrammarState(await compiler.compile(regex("ab?")), ignore_eos=True)
    assert follows(state, [backend.token_to_id("a")])
    assert allowed(state) == {backend.token_to_id("b")}
    assert follows(state, [backend.token_to_id("b")])
    assert allowed(state) == {EOS}  # nothing else is left: no deadlock


async def test_special_and_padding_tokens_are_no_text(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    state = GrammarState(await compiler.compile(regex("(?s:.)*")), ignore_eos=False)
    everything = allowed(state)
    assert EOS in everything  # as the end, not as its text
    assert max(everything) < backend.get_vocab_size()
    assert len(everything) > 200


@pytest.mark.parametrize("name", ["<|endoftext|>", "<tool>", "</s>"])
@pytest.mark.parametrize("is_normalized", [False, True])
async def test_the_name_of_a_special_token_in_a_grammar_is_text(
    folder: Path, tmp_path: Path, name: str, is_normalized: bool
) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ["<tool>", "</s>"]
    backend.add_special_tokens([AddedToken(one, special=True, normalized=is_normalized) for one in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    special = backend.token_to_id(name)
    quoted = json.dumps(f"a{name}b")
    grammars = [schema({"const": f"a{name}b"}), lark(f"start: {quoted}"), lark(f"start: {quoted} // {name}")]
    grammars.append(regex(quoted.replace("|", r"\|").replace("/", r"\/")))
    with closing(GrammarCompiler(tmp_path, VOCAB_SIZE, (EOS,))) as compiler:
        for grammar in grammars:
            state, written = GrammarState(await compiler.compile(grammar), ignore_eos=False), b""
            while (token_ids := allowed(state)) != {EOS}:
                assert not token_ids & {special, EOS}
                assert state.advance(min(token_ids))
                written += backend.decode([min(token_ids)]).encode()
            assert written.decode() == (f"a{name}b" if grammar.kind is GrammarKind.LARK else quoted)
        # Without quotes it is the token.
        if special != EOS:
            state = GrammarState(await compiler.compile(lark(f'start: {name} "a"')), ignore_eos=False)
            assert allowed(state) == {special}
            assert state.advance(special)


@pytest.mark.parametrize("end", ["<|endoftext|>", f"<[{EOS}]>", f"<[{EOS}-{EOS}]>"])
async def test_an_end_of_sequence_is_an_end_also_if_a_grammar_names_it(compiler: GrammarCompiler, end: str) -> None:
    with pytest.raises(InvalidRequestError, match="no token of the model fits"):
        await compiler.compile(lark(f'start: {end} "a"'))
    state = GrammarState(await compiler.compile(lark(f'start: {end} "a" | "b"')), ignore_eos=False)
    assert EOS not in allowed(state)


async def test_tokens_can_be_taken_back(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    a, b, c = (backend.token_to_id(text) for text in "abc")
    state = GrammarState(await compiler.compile(regex("a(bc|cb)d*")), ignore_eos=False)
    assert follows(state, [a, b, c, EOS])
    assert state.has_ended
    state.rollback(0)
    assert state.has_ended
    state.rollback(3)
    assert not state.has_ended
    assert allowed(state) == {b, c}
    assert follows(state, [c])
    assert allowed(state) == {b}


async def test_the_schema_true_accepts_everything(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    state = GrammarState(await compiler.compile(schema(" true ")), ignore_eos=False)
    assert follows(state, backend.encode('{"n":[1,null]}').ids)


async def test_a_schema_is_followed_to_its_end(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    person = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    compiled = await compiler.compile(schema(person | {"additionalProperties": False}))
    for text, is_right in (
        ('{"n":1}', True),
        ('{ "n" :\n  12}', True),
        ('{"n":"1"}', False),
        ('{"m":1}', False),
        ('{"n":' + " " * 64 + "1}", True),
        ('{\n    "n": 1\n}', True),
        ('{\n\n"n": 1}', False),
        ('{"n":' + " " * 65 + "1}", False),  # white space may not go on for ever
    ):
        state = GrammarState(compiled, ignore_eos=False)
        assert (follows(state, backend.encode(text).ids) and EOS in allowed(state)) is is_right, text


BAD = {
    "regex syntax": (regex("(a"), "unclosed group"),
    "look-around": (regex("(?=a)b"), "look-around"),
    "back reference": (regex(r"(a)\1"), "backreferences"),
    "deep regex": (regex("(" * 30_000 + "a" + ")" * 30_000), ""),
    "a regex that matches nothing": (regex(r"[^\x00-\x{10FFFF}]"), ""),
    "no JSON": (schema("{"), ""),
    "bare true, mistyped": (schema("True"), ""),
    "deep JSON": (schema("[" * 30_000), "recursion limit"),
    "no schema": (schema("5"), "object schema"),
    "unknown type": (schema({"type": "foo"}), "foo"),
    "unsupported keyword": (schema({"type": "string", "not": {"const": "x"}}), "not"),
    "unsatisfiable": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    "false": (schema("false"), "object schema"),
    "endless": (schema({"$ref": "#"}), ""),
    "remote reference": (schema({"$ref": "https://example.com/x.json"}), "example.com"),
    "exponential": (
        schema({"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(6)]} for i in range(14)]}),
        "too large",
    ),
    "surrogate": (schema('{"const": "\\ud800"}'), ""),
    "unknown rule": (lark("start: foo"), "foo"),
    "lexer error": (lark("\x00\x01{}%%"), "lexer error"),
    "a rule without end": (lark('start: a\na: a "x"'), ""),
    "deep Lark": (lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "deeply nested"),
    "long Lark": (lark("start: a\n" + "\n" * 1000), "1002 lines"),
    # The library recurses without end on these.
    "smallest integer": (schema({"const": -(2**63)}), "-9223372036854775808 is not from -9223372036854774784 to"),
    "nearly the smallest": (schema({"const": -(2**63) + 512}), "the number -9223372036854775296"),
    "nested": (schema({"properties": {"a": {"items": [{"enum": ["x", {"y": -(2**63)}]}]}}}), "the number"),
    "integer bounds": (schema({"type": "integer", "minimum": -(2**64), "maximum": -(2**63)}), "the number"),
    "real bounds": (schema('{"type":"integer","minimum":-1e22,"maximum":-1.5e19}'), "the number -1e22"),
    "one that it would say otherwise": (schema({"enum": [2**63]}), "to 9223372036854775807"),
    "many digits": (schema('{"const":-1' + "0" * 5000 + "}"), "..."),
    "within Lark": (lark('start: a | b\na: %json {"const": 1}\nb: %json{"const": -9223372036854775808}'), "the number"),
}


@pytest.mark.parametrize(("grammar", "reason"), BAD.values(), ids=BAD.keys())
async def test_what_cannot_be_compiled_names_itself(compiler: GrammarCompiler, grammar: Grammar, reason: str) -> None:
    assert len(grammar.text) <= MAX_GRAMMAR_BYTES
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(InvalidRequestError) as caught:
            await compiler.compile(grammar)
        assert caught.value.field == f"sampling.grammar.{grammar.kind.value}"
        assert reason in caught.value.allowed
        assert len(caught.value.allowed) < 300
        assert "<state>" not in caught.value.allowed


async def test_numbers_up_to_the_bounds_are_followed(compiler: GrammarCompiler, backend: Tokenizer) -> None:
    for number in (-(2**63) + 1024, 2**63 - 1, -1.5, 0):
        state = GrammarState(await compiler.compile(schema({"const": number})), ignore_eos=False)
        assert follows(state, backend.encode(str(number)).ids), number


ENDLESS = schema({"type": "integer", "multipleOf": 2**31})
BOMB = lark("start: A\nA: " + " & ".join(f"/(.*[a-{chr(98 + i % 24)}]){{3}}.*/" for i in range(60)))


@pytest.mark.parametrize(
    ("grammar", "trial", "reason"),
    [
        (ENDLESS, TrialLimits(cpu_s=1), "longer than 1 s"),
        (ENDLESS, TrialLimits(memory_bytes=1 << 24), "more than 16 MiB"),
        (BOMB, TrialLimits(cpu_s=1), "longer than 1 s"),
    ],
    ids=["CPU time", "memory", "bomb"],
)
async def test_what_ends_the_library_ends_a_process_of_its_own(
    folder: Path, grammar: Grammar, trial: TrialLimits, reason: str
) -> None:
    limits = CompilerLimits(timeout_s=60.0, trial=trial)
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (EOS,), limits)) as compiler:
        with pytest.raises(InvalidRequestError, match=reason):
            await compiler.compile(grammar)
        assert (await compiler.compile(regex("a"))).grammar == regex("a")


async def test_a_machine_too_busy_to_compile_is_no_fault_of_the_grammar(folder: Path) -> None:
    """The time is over before the grammar has had its share of processor time: it may be tried again."""
    limits = CompilerLimits(timeout_s=60.0, trial=TrialLimits(cpu_s=60, wall_s=0.3))
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (EOS,), limits)) as compiler:
        with pytest.raises(CapacityError, match="too busy") as caught:
            await compiler.compile(ENDLESS)
        assert caught.value.retry_after_s > 0
        first = compiler.submit(ENDLESS)
        assert not first.done(), "it is tried anew"
        with pytest.raises(CapacityError):
            await compiler.compile(ENDLESS)
        assert first.done()


async def test_a_trial_that_stands_still_is_no_fault_of_the_grammar(tmp_path: Path) -> None:
    vocabulary = GrammarVocabulary(write_tokenizer(tmp_path, VOCAB_SIZE - 5), VOCAB_SIZE, (EOS,))
    with closing(GrammarSandbox(vocabulary, TrialLimits())) as sandbox:
        assert sandbox.refusal(regex("a")) is None
        sandbox._process._patience_s = 0.3
        (trial,) = processes_with(str(tmp_path))
        os.kill(trial, signal.SIGSTOP)
        with pytest.raises(CapacityError, match="too busy"):
            sandbox.refusal(regex("b"))
        sandbox._process._patience_s = 60.0
        assert sandbox.refusal(regex("b")) is None


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("victim", ["the fork", "the process"])
async def test_a_crash_refuses_its_grammar_and_no_other(tmp_path: Path, victim: str) -> None:
    """As if the library had overflowed its stack."""
    limits = CompilerLimits(timeout_s=60.0)
    with closing(GrammarCompiler(write_tokenizer(tmp_path, VOCAB_SIZE - 5), VOCAB_SIZE, (EOS,), limits)) as compiler:
        await compiler.compile(regex("a"))
        crashing = asyncio.create_task(compiler.compile(ENDLESS))
        while not crashing.done():
            for trial in processes_with(str(tmp_path)):
                for fork in children_of(trial):
                    os.kill(fork if victim == "the fork" else trial, signal.SIGSEGV)
            await asyncio.sleep(0.02)
        with pytest.raises(InvalidRequestError, match="does not survive"):
            crashing.result()
        assert (await compiler.compile(regex("b"))).grammar == regex("b")
    await asyncio.to_thread(assert_none_left_with, str(tmp_path))


# What made the library overflow an ordinary thread's stack, or compute for seconds.
MONSTERS = {
    "chain of rules": lark("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(990)) + '\nr990: "z"'),
    "chain of terminals": lark("start: R0\n" + "\n".join(f"R{i}: R{i + 1}*" for i in range(900)) + '\nR900: "z"'),
    "chain of references": schema(
        {"$ref": "#/d/0", "d": {str(i): {"$ref": f"#/d/{i + 1}"} for i in range(1800)} | {"1800": {"type": "null"}}}
    ),
    "one line of alternatives": lark("start: " + " | ".join(f'"{i}"' for i in range(9000))),
    "repeated repetition": regex("(a{1000}){1000}"),
    "intersection": lark("start: A\nA: " + " & ".join(f"/.*{chr(97 + i)}.{{{i + 5}}}.*/" for i in range(14))),
    "many properties": schema({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}),
    "long enumeration": schema({"enum": [f"value{i}" for i in range(4000)]}),
}


@pytest.mark.parametrize("grammar", MONSTERS.values(), ids=MONSTERS.keys())
async def test_monsters_are_bounded_and_stall_nobody(compiler: GrammarCompiler, grammar: Grammar) -> None:
    """Either they work or they are refused; the event loop goes on, and so does a step of the device thread."""
    longest_pause_s = 0.0

    async def watch() -> None:
        nonlocal longest_pause_s
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest_pause_s = max(longest_pause_s, time.monotonic() - before)

    watcher = asyncio.create_task(watch())
    try:
        state = GrammarState(await compiler.compile(grammar), ignore_eos=True)
        for _ in range(20):
            await asyncio.to_thread(state.advance, min(allowed(state)))
    except InvalidRequestError as error:
        assert error.field.startswith("sampling.grammar.")  # noqa: PT017
    finally:
        watcher.cancel()
    assert longest_pause_s < 1.0


async def test_a_walk_that_becomes_too_complex_is_an_error_and_the_grammar_is_compiled_anew(
    compiler: GrammarCompiler, backend: Tokenizer
) -> None:
    grammar = lark("start: A\nA: ~/.*a.{14}b.*/ & /.{20,90}/")
    compiled = await compiler.compile(grammar)
    assert await compiler.compile(grammar) is compiled
    state = GrammarState(compiled, ignore_eos=False)
    ids = backend.encode("ab" * 90).ids
    with pytest.raises(InvalidRequestError, match=r"sampling\.grammar\.lark is .*too"):
        follows(state, ids)
    assert await compiler.compile(grammar) is not compiled


async def test_a_grammar_is_compiled_once_and_the_least_recently_used_is_forgotten(folder: Path) -> None:
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (EOS,), CompilerLimits(num_kept=2))) as compiler:
        first, again = await asyncio.gather(*(compiler.compile(regex("a")) for _ in range(2)))
        assert first is again
        second = await compiler.compile(regex("b"))
        assert await compiler.compile(regex("a")) is first
        await compiler.compile(regex("c"))
        assert await compiler.compile(regex("a")) is first
        assert await compiler.compile(regex("b")) is not second


async def test_slow_ones_time_out_and_waiting_ones_are_told_to_come_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = CompilerLimits(num_workers=1, max_waiting=1, timeout_s=0.05)
    compile_now = GrammarCompiler._compiled

    def slow(self: GrammarCompiler, grammar: Grammar, sandbox: GrammarSandbox) -> object:
        time.sleep(0.5)
        return compile_now(self, grammar, sandbox)

    monkeypatch.setattr(GrammarCompiler, "_compiled", slow)
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (EOS,), limits)) as compiler:
        outcomes = await asyncio.gather(*(compiler.compile(regex(text)) for text in "abc"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [CapacityError] * 3
        assert "not compiled within 0.05 s" in str(outcomes[0])
        async with asyncio.timeout(20):
            while compiler.poll(regex("a")) is None:  # noqa: ASYNC110 - the work was not in vain
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("eos_token_ids", [(), (VOCAB_SIZE - 1,)])
async def test_a_model_without_an_end_or_a_tokenizer_refuses_grammars(
    folder: Path, tmp_path: Path, eos_token_ids: tuple[int, ...]
) -> None:
    with (
        closing(GrammarCompiler(folder, VOCAB_SIZE, eos_token_ids)) as compiler,
        pytest.raises(InvalidRequestError, match="no end-of-sequence token"),
    ):
        await compiler.compile(regex("a"))
    with (
        closing(GrammarCompiler(tmp_path, VOCAB_SIZE, (EOS,))) as compiler,
        pytest.raises(InvalidRequestError, match="no tokenizer"),
    ):
        await compiler.compile(regex("a"))


async def test_a_vocabulary_smaller_than_the_tokenizers(folder: Path, backend: Tokenizer) -> None:
    """Ids beyond the model's are not allowed; if only such are left, that is an error."""
    letters = {token_id: text for text, token_id in backend.get_vocab().items() if len(text) == 1 and text.islower()}
    vocab_size = sorted(letters)[3]
    with closing(GrammarCompiler(folder, vocab_size, (EOS,))) as compiler:
        bits = GrammarState(await compiler.compile(regex("[a-z]+")), ignore_eos=False).allowed_bits()
    token_ids = [token_id for token_id in range(8 * len(bits)) if bits[token_id // 8] >> token_id % 8 & 1]
    assert token_ids == sorted(letters)[:3]
    with closing(GrammarCompiler(folder, 5, (EOS,))) as compiler, pytest.raises(InvalidRequestError, match="no token"):
        await compiler.compile(regex("z"))


@pytest.mark.parametrize("is_special", [True, False])  # in Qwen3's vocabulary they are added, but not special
async def test_marks_of_thinking_may_be_tokens(folder: Path, tmp_path: Path, is_special: bool) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<first>", special=True)])
    backend.add_tokens([AddedToken(mark, special=is_special) for mark in ("<think>", "</think>")])
    backend.add_special_tokens([AddedToken("<last>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    opening, end = (backend.token_to_id(mark) for mark in ("<think>", "</think>"))
    with closing(GrammarCompiler(tmp_path, VOCAB_SIZE, (EOS,))) as compiler:
        for is_open in (True, False):
            grammar = Grammar(GrammarKind.REGEX, "ab", Thinking("<think>", "</think>", is_open))
            state = GrammarState(await compiler.compile(grammar), ignore_eos=False)
            if not is_open:
                assert allowed(state) >= {opening, *backend.encode("a").ids}
                assert not allowed(state) & {end, EOS}
                assert state.advance(opening)
            for token_id in backend.encode("</thin k so: b").ids:
                assert state.advance(token_id)
            assert not allowed(state) & {EOS, *map(backend.token_to_id, ("<first>", "<last>"))}
            for token_id in (end, *backend.encode("\n\na").ids, *backend.encode("b").ids):
                assert state.advance(token_id)
            assert allowed(state) == {EOS}


async def test_an_answer_may_have_a_channel_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Harmony's: the grammar is for the final channel, which begins wherever the thinking ends."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    channel, message, _, _ = (backend.token_to_id(name) for name in names)
    final = "<|channel|>final<|message|>"
    thinking = Thinking("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", False, final)
    with closing(GrammarCompiler(tmp_path, VOCAB_SIZE, (EOS,))) as compiler:
        compiled = await compiler.compile(Grammar(GrammarKind.REGEX, "ab", thinking))
    for before in ("", f"{thinking.opening}so: {{ab}}\n{thinking.closing}"):
        state = GrammarState(compiled, ignore_eos=False)
        assert allowed(state) == {channel}
        for token_id in backend.encode(f"{before}{final}").ids:
            assert token_id in allowed(state)
            assert EOS not in allowed(state)
            assert state.advance(token_id)
        assert message not in allowed(state)
        for token_id in backend.encode("ab").ids:
            assert state.advance(token_id)
        assert allowed(state) == {EOS}


@pytest.mark.parametrize("grammar", [regex("ab"), schema({"type": "integer"}), lark('start: "a" "b"')])
async def test_any_grammar_may_come_after_thinking(
    compiler: GrammarCompiler, backend: Tokenizer, grammar: Grammar
) -> None:
    grammar = replace(grammar, thinking=Thinking("<think>", "</think>", is_open=False))
    for before in ("", "<think>hm, {1</think>\n", "<think></think>"):
        state = GrammarState(await compiler.compile(grammar), ignore_eos=False)
        text = before + ("12" if grammar.kind is GrammarKind.JSON_SCHEMA else "ab")
        for token_id in backend.encode(text).ids:
            assert state.advance(token_id), text
        assert EOS in allowed(state)
