"""A byte-level tokenizer of a GGUF file, made without transformers, which takes seconds and memory to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from easyspec.checkpoint.gguf_header import GgufHeader

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Texts are cut by these rules before merging: as GPT-2 cuts them, and the same with every digit by itself.
_SPLIT_AS_GPT2 = ("", "default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "mpt", "olmo", "roberta-bpe")
_SPLIT_WITH_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_CONTROL, _USER_DEFINED = 3, 4


def is_plain_byte_level(header: GgufHeader) -> bool:
    """Whether `byte_level_backend` knows the file's kind of tokenizer."""
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return False
    return _rule(header) in (*_SPLIT_AS_GPT2, *_SPLIT_WITH_SINGLE_DIGITS)


def byte_level_backend(header: GgufHeader) -> Tokenizer:
    """The tokenizers library's own for a file that `is_plain_byte_level`; raises what the library raises."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spelled(token: str) -> str:
        """Bytes as the characters that stand for them; some files have texts as they are."""
        return token if alphabet.issuperset(token) else spelling.pre_tokenize_str(token)[0][0]

    vocabulary = {spelled(token): token_id for token_id, token in enumerate(header.tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in header.merges)]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="")
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if _rule(header) in _SPLIT_WITH_SINGLE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    else:
        backend.pre_tokenizer = bytes_
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = _post_processor(header)
    kinds = list(zip(header.tokens, header.metadata.get("tokenizer.ggml.token_type") or (), strict=False))
    # A control token in other characters than bytes are spelled in is a mistake of the converter.
    special = [token for token, kind in kinds if kind == _CONTROL and alphabet.issuperset(token)]
    known = [token for token, kind in kinds if kind == _USER_DEFINED and token in vocabulary]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in known])
    roles = [token for token in special_tokens(header).values() if token not in (*special, *known)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in roles])
    return backend


def special_tokens(header: GgufHeader) -> dict[str, str]:
    """The tokens of the roles that the file gives to some: bos_token, eos_token, unk_token and pad_token."""
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return {role: header.tokens[token_id] for role, token_id in ids.items() if token_id is not None}


def _post_processor(header: GgufHeader) -> Any:
    """What stands around every text: the tokens that begin and end one, where the file says so."""
    from tokenizers import processors

    roles = special_tokens(header)

    def added(role: str) -> list[str]:
        wanted = header.metadata.get(f"tokenizer.ggml.add_{role}")
        return [roles[role]] if wanted and role in roles else []

    first, last = added("bos_token"), added("eos_token")
    ids = {token: header.tokens.index(token) for token in (*first, *last)}
    single, second = (
        [*(f"{token}:{number}" for token in first), f"${text}:{number}", *(f"{token}:{number}" for token in last)]
        for number, text in enumerate("AB")
    )
    return processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=list(ids.items()))


def _rule(header: GgufHeader) -> str:
    return str(header.metadata.get("tokenizer.ggml.pre", ""))
