"""How texts begin that the base is to go on with: nothing but the template's header, first words of a request, a
request about the standard library's code, or its code and documentation themselves.

Evaluation prompts are held out: no opening here is the beginning of one of them.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

from models.recipe.corpus import Kind, training_pass
from models.recipe.settings import CorpusSettings
from models.recipe.smollm2.settings import WritingSettings

_QUESTIONS = (
    "What is", "What are", "What does", "What would happen if", "How do I", "How does", "How can I", "Why is", "Why do",
    "When did", "Where is", "Which", "Who was", "Can you explain", "Can you help me", "Could you tell me about",
    "Is it true that", "Tell me about", "Describe", "Explain", "Explain in simple terms", "Compare",
    "What is the difference between", "Give me some tips for", "Give me three ideas for", "I want to learn",
    "I'm planning", "I have a problem with", "Help me write", "List the", "Recommend", "Suggest", "Name five",
    "What should I", "Do you know", "Please describe", "In one sentence, what is", "Teach me", "Hi, I need", "Hello!",
)  # fmt: skip
_CODE = (
    "Write a Python function that", "Write a Python function to", "Write a Python class", "Write a program that",
    "Write a SQL query", "Write a JavaScript function", "Write a bash command", "Write HTML for", "Implement",
    "How do I sort", "How do I read", "Fix this Python code:\n\n", "What does this Python code do?\n\n",
    "Write a unit test for", "Convert this loop", "Write a regular expression that", "Create a function called",
    "Here is my Python code:\n\n```python\n", "Write a Python script which", "Add comments to this code:\n\n",
)  # fmt: skip
_TEXTS = (
    "Rewrite this sentence in a formal tone:\n\n", "Rewrite the following paragraph to be shorter:\n\n",
    "Rewrite this email to sound friendlier:\n\nDear", "Make this text more polite:\n\n", "Correct the grammar:\n\n",
    "Rephrase: ", "Turn this into bullet points:\n\n", "Translate into simple English:\n\n", "Proofread this:\n\n",
    "Summarize the following text:\n\n", "Summarize this article in two sentences:\n\n", "Give a short summary of:\n\n",
    "What are the main points of this passage?\n\n", "Write a title for this text:\n\n", "Shorten this:\n\n",
    "Extract all names from this text:\n\n", "Extract the dates and places from the text below.\n\n",
    "Extract the information below as JSON with the keys", "Return a JSON object describing", "Give me a JSON list of",
    "Which product and price are named here? Answer in JSON.\n\n", "Make a table of", "Classify the sentiment of:\n\n",
    "Find the email address in this message:\n\n", "Answer from the text only.\n\nText:", "Write an email to",
    "Write a short story about", "Write a poem about", "Write a product description for", "Write a letter",
)  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """`text` is where a text begins; the base goes on as `role`: "user", "assistant", or "" for no turn."""

    kind: str
    text: str
    role: str


class Openings:
    """Draws openings; the base's chat template says what stands before a user's words."""

    def __init__(self, tokenizer: Any, corpus: CorpusSettings, settings: WritingSettings) -> None:
        self._settings = settings
        self._corpus = corpus
        whole = tokenizer.apply_chat_template([{"role": "user", "content": "|"}], tokenize=False)
        self._user_header = whole[: whole.rindex("|", 0, whole.rindex("<|im_end|>"))]

    def draw(self, choose: random.Random) -> Opening:
        settings, kind = self._settings, choose.random()
        if kind < settings.continuation_share:
            text = choose.choice(self._material[0])
            start = choose.randrange(max(1, len(text) - 600))
            return Opening("continuation", text[start : start + choose.randint(100, 600)].rstrip(), "")
        if kind < settings.continuation_share + settings.code_question_share:
            question = choose.choice(self._material[1])
            return Opening("library", f"{self._user_header}{question}<|im_end|>\n<|im_start|>assistant\n", "assistant")
        if choose.random() >= settings.opened_share:
            return Opening("free", self._user_header, "user")
        name, words = choose.choice((("question", _QUESTIONS), ("code", _CODE), ("text", _TEXTS)))
        return Opening(name, self._user_header + choose.choice(words), "user")

    @functools.cached_property
    def _material(self) -> tuple[list[str], list[str]]:
        """Texts to go on with, and questions about code."""
        documents = training_pass(self._corpus, 0)
        texts = [document.text for document in documents if document.kind in (Kind.LIBRARY, Kind.PROSE)]
        turns = [document.text for document in documents if document.kind is Kind.CHAT]
        questions = [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in turns]
        return texts, [question for question in questions if len(question) < 500]
