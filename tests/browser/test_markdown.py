"""What the page makes of an answer in Markdown, in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.browser.chromium import EXECUTABLE, Page, chromium
from tests.gateway.rest.conftest import Rest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="NO CHROMIUM HERE: Markdown is NOT tested (install chromium)"),
]

CASES = {
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "a *b* **c** __d__ ~~e~~ `f * g`": "<p>a <em>b</em> <strong>c</strong> <strong>d</strong> <del>e</del> "
    "<code>f * g</code></p>",
    "2 * 3 * 4, snake_case_name, **open": "<p>2 * 3 * 4, snake_case_name, **open</p>",
    "**bold *and* more**": "<p><strong>bold <em>and</em> more</strong></p>",
    r"\*no\*": "<p>*no*</p>",
    "# Title #\ntext": "<h3>Title</h3><p>text</p>",
    "### a\n#### b": "<h3>a</h3><h4>b</h4>",
    "1. one\n2. two\n   - deep\n\n3. three": "<ol><li>one</li><li>two<ul><li>deep</li></ul></li><li>three</li></ol>",
    "4. four": '<ol start="4"><li>four</li></ol>',
    "- a\n- b\nafter": "<ul><li>a</li><li>b<br>after</li></ul>",
    "> said\n> twice": "<blockquote><p>said<br>twice</p></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "[a](https://b.example/c) [d](javascript:alert(1))": '<p><a href="https://b.example/c" target="_blank" '
    'rel="noopener noreferrer">a</a> [d](javascript:alert(1))</p>',
    "see https://b.example/c.": '<p>see <a href="https://b.example/c" target="_blank" rel="noopener noreferrer">'
    "https://b.example/c</a>.</p>",
    "<img src=x onerror=alert(1)> & <b>": "<p>&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;</p>",
    "a | b\n--|--\n1 | **2**": '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
    "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table></div>",
    "": "",
}


@pytest.fixture
async def page(rest: Rest, tmp_path: Path) -> AsyncIterator[Page]:
    async with chromium(tmp_path / "profile") as browser:
        page = await browser.page()
        await page.open(rest.base_url)
        await page.evaluate("import('/static/markdown.js').then(module => { window.markdown = module; })")
        yield page
        assert page.errors == []


async def rendered(page: Page, source: str) -> str:
    text = json.dumps(source)
    return str(
        await page.evaluate(
            f"(source => {{ const place = document.createElement('div');"
            f" place.append(...markdown.renderMarkdown(source, (from, to) => [source.slice(from, to)]));"
            f" return place.innerHTML; }})({text})"
        )
    )


async def test_markdown_becomes_nodes_and_nothing_becomes_a_tag(page: Page) -> None:
    for source, html in CASES.items():
        assert await rendered(page, source) == html, source


async def test_code_keeps_its_lines_and_may_still_be_open(page: Page) -> None:
    for closing in ("\n```", ""):
        html = await rendered(page, f"```python\nif a < b:\n    return *c*{closing}")
        assert "<span>python</span>" in html
        assert "if a &lt; b:\n    return *c*\n" in html


async def test_every_sign_is_shown_once_however_odd_the_text(page: Page) -> None:
    odd = ["**", "*a**b*", "``", "[x](", "- \n-\n", "> > > a", "|\n|-|", "~~~\n", "1. a\n\n   b\n2) c", "\\", "***x***"]
    for source in [*odd, "\n".join(odd), " ".join(odd)]:
        counted = await page.evaluate(
            f"(source => {{ const seen = new Array(source.length).fill(0);"
            f" markdown.renderMarkdown(source, (from, to) => {{ for (let i = from; i < to; i++) seen[i]++;"
            f" return [source.slice(from, to)]; }}); return Math.max(0, ...seen); }})({json.dumps(source)})"
        )
        assert counted <= 1, source
