from __future__ import annotations

import json
from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError, InvalidRequestError, PromptTooLongError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import write_metaspace_tokenizer, write_tokenizer


@pytest.mark.parametrize("text", ["def f(n):\n    return n", " leading", "über 中文 😀", "a"])
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_beyond_the_context_is_refused_before_it_is_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def f(n): return n " * 20_000
    whole = tokenizer.encode(text)
    assert tokenizer.encode(text, len(whole)) == whole
    spaces = " " * 100_000  # many characters, few tokens
    assert tokenizer.encode(spaces, 60_000) == tokenizer.encode(spaces)
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    with pytest.raises(PromptTooLongError, match=r"more than .* tokens'; allowed: at most 512 tokens"):
        tokenizer.encode(text, 512)


def test_a_conversation_is_rendered_with_the_template(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.prompt_of(Conversation((ChatTurn("system", "be brief"), ChatTurn("user", "hi")))).token_ids
    assert tokenizer.decode(token_ids) == "[system] be brief\n[user] hi\n[assistant] "


@pytest.mark.parametrize(
    ("turns", "field"),
    [([], "prompt.chat.messages"), ([ChatTurn("clown", "x")], "prompt.chat.messages[0].role")],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(
    tokenizer: Tokenizer, turns: list[ChatTurn], field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.prompt_of(Conversation(tuple(turns)))
    assert caught.value.field == field


def test_a_model_without_template_refuses_conversations(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Tokenizer.load(folder).prompt_of(Conversation((ChatTurn("user", "hi"),)))


def test_fingerprints_differ_with_the_vocabulary_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    same = write_tokenizer(tmp_path / "same")
    (same / "chat_template.jinja").write_text("{{ messages }}")
    content = json.loads((same / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 7, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (same / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(same) == tokenizer.fingerprint
    assert tokenizer_fingerprint(write_tokenizer(tmp_path / "smaller", vocab_size=330)) != tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64


def test_swapped_ids_change_the_fingerprint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_tokenizer(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(folder) != tokenizer.fingerprint


def test_every_kind_of_vocabulary_has_a_fingerprint(tmp_path: Path) -> None:
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert len(tokenizer_fingerprint(tmp_path)) == 64
    assert tokenizer_fingerprint(write_metaspace_tokenizer(tmp_path / "m")) != tokenizer_fingerprint(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"model": {"vocab": 3}}'])
def test_a_folder_without_tokenizer_fails_at_start_up(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_turn_ends_with_the_special_token_behind_an_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_turn_ids == frozenset()  # a line ends the turn there
    folder = write_tokenizer(tmp_path)
    template = "{% for message in messages %}{{ message.content }} <|endoftext|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    assert Tokenizer.load(folder).end_of_turn_ids == {tokenizer.encode("<|endoftext|>")[0]}


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must take turns') }}")
    with pytest.raises(InvalidRequestError, match="roles must take turns"):
        Tokenizer.load(folder).prompt_of(Conversation((ChatTurn("user", "hi"),)))
