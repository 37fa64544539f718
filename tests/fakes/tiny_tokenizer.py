"""Tokenizers of a few hundred entries, as checkpoint folders."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXTS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "for number in range(10):\n    print(number, 'stop here', STOP)\n",
    "the quick brown fox jumps over the lazy dog; über straße 中文字符 émigré 😀",
]


def write_tokenizer(folder: Path, vocab_size: int = 340) -> Path:
    """A byte-level BPE tokenizer: round-trips any text, splits most characters beyond ASCII over tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _save(backend, folder)


def write_metaspace_tokenizer(folder: Path) -> Path:
    """A tokenizer of the Llama 2 kind: a blank is part of the word, and decoding drops the first one."""
    words = ["<unk>", "<s>", "▁", "▁Hello", "▁world", "wide", "▁a", "b"]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<s>", special=True)])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return _save(backend, folder)


def _save(backend: Backend, folder: Path) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return folder
