"""Chat templates run in a process of their own, within limits."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from gateway.text.template_process import TemplateLimitError, TemplateProcess

ECHO = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "h\u00e9 \ud800 </s>"}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def test_a_template_is_rendered_as_the_library_does(process: TemplateProcess) -> None:
    assert process.render(ECHO, messages=MESSAGES) == f"user: {MESSAGES[0]['content']}\n"
    assert process.render(
        "{{ bos_token }}{{ tools | tojson }}", messages=MESSAGES, tools=[{"a": 1}], bos_token="<s>"
    ) == ('<s>[{"a": 1}]')
    long = [{"role": "user", "content": "x" * (4 << 20)}]
    assert process.render(ECHO, messages=long) == f"user: {long[0]['content']}\n"


def test_a_template_refuses_in_its_own_words(process: TemplateProcess) -> None:
    with pytest.raises(ValueError, match=r"^roles must alternate$"):
        process.render("{{ raise_exception('roles must alternate') }}", messages=MESSAGES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 4000000000 }}",
        "{{ '%4000000000d' % 1 }}",
        "{{ 'x'.ljust(4000000000) }}",
        "{% set ns = namespace(x='x') %}{% for _ in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 40000000 }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('a' * 30 ~ 'b') | replace('a', 'aaaaaaaaaaaaaaaa' * 100000000) }}",
    ],
)
def test_a_template_that_takes_too_much_is_an_error_and_the_next_one_is_rendered(
    process: TemplateProcess, bomb: str
) -> None:
    with pytest.raises((TemplateLimitError, ValueError)):
        process.render(bomb, messages=MESSAGES)
    assert process.render(ECHO, messages=MESSAGES).startswith("user: ")


def test_a_process_that_was_killed_is_replaced_and_one_that_is_asked_by_many_answers_each(
    process: TemplateProcess,
) -> None:
    child = process._process._process
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with pytest.raises(TemplateLimitError):
        process.render(ECHO, messages=MESSAGES)
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = process.render(ECHO, messages=[{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"user: {number}\n" for number in range(20)}


def test_a_process_that_hangs_is_given_up() -> None:
    process = TemplateProcess()
    process.render(ECHO, messages=MESSAGES)
    child = process._process._process
    assert child is not None
    process._process._patience_s = 0.5
    os.kill(child.pid, signal.SIGSTOP)
    started_s = time.monotonic()
    with pytest.raises(TemplateLimitError):
        process.render(ECHO, messages=[{"role": "user", "content": "x" * (1 << 20)}])  # more than a pipe holds
    assert time.monotonic() - started_s < 30
    process.close()
