"""What the playground page is made of, and the traces it draws."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from gateway.rest.playground import FILES, PATHS
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, chat_body, completion_body, refused, serving_rest

STATIC = resources.files("gateway.rest") / "static"


async def test_the_page_and_everything_it_names_are_served(rest: Rest) -> None:
    page = await rest.http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="(/[^"]*)"', page.text))
    assert named == {"/static/app.js", "/static/icon.svg", "/static/playground.css"}
    for path in PATHS - {"/"}:
        response = await rest.http.get(path)
        assert response.status_code == 200
        assert "charset=utf-8" in response.headers["content-type"] or path.endswith(".svg")
        assert response.headers["x-content-type-options"] == "nosniff"


async def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere(rest: Rest) -> None:
    policy = (await rest.http.get("/")).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "frame-ancestors 'none'" in policy


def test_every_file_is_listed_and_none_reaches_elsewhere() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in STATIC.iterdir()}
    assert set(files) == set(FILES)
    namespaces = "http://www.w3.org/2000/svg"
    for name, content in files.items():
        assert not re.findall(r"https?://|//cdn", content.replace(namespaces, "")), name
        imported = re.findall(r'from "\./([^"]+)"', content)
        assert set(imported) <= set(FILES)
    assert not re.search(r"<script>|<style>|\son\w+=|style=", files["index.html"])
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", "".join(files.values()))


def test_every_input_has_a_label() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    labelled = set(re.findall(r'<label[^>]* for="([^"]+)"', page)) | {"ignore_eos", "show-guesses"}  # inside theirs
    inputs = set(re.findall(r'<(?:input|select|textarea) id="([^"]+)"(?![^>]*aria-label)', page)) | set(
        re.findall(r'<input type="range" id="([^"]+)"(?![^>]*aria-label)', page)
    )
    assert inputs
    assert inputs <= labelled


@pytest.mark.parametrize(
    "path", ["/static/../fields.py", "/static/index.html", "/static/%2e%2e/fields.py", "/static/x"]
)
async def test_no_other_file_is_served(rest: Rest, path: str) -> None:
    refused(await rest.http.get(path), 404)


async def test_the_page_is_there_while_the_gateway_drains(pair: FakePair, tokenizer_folder: object) -> None:
    async with serving_rest(pair, tokenizer_folder) as rest:  # type: ignore[arg-type]
        await rest.gateway.drain(0.0)
        refused(await rest.http.get("/health"), 503)
        assert (await rest.http.get("/")).status_code == 200


# --- traces -----------------------------------------------------------------------------------------------------


async def test_a_traced_stream_tells_each_round(rest: Rest) -> None:
    events = await rest.stream("/v1/completions", completion_body(speculation={"trace": True}))
    traces = [event["easyspec"] for event in events]
    assert len(traces) == len(rest.pair.verifier.trees)
    for trace, tree in zip(traces, rest.pair.verifier.trees, strict=True):
        assert trace["tree"]["parent_rows"] == list(tree.parent_rows)
        assert len(trace["tree"]["token_texts"]) == len(tree)
        accepted = [trace["tree"]["token_texts"][row - 1] for row in trace["accepted_rows"]]
        assert trace["token_texts"][: len(accepted)] == accepted
    text = "".join(event["choices"][0]["text"] for event in events)
    assert "the quick brown fox" in text
    assert sum(len(trace["token_texts"]) for trace in traces) == 60
    timings = traces[1]["timings_ms"]
    assert timings["round"] >= timings["draft"] + timings["verify"] > 0
    assert (timings["calibrate"], timings["fuzzy"], timings["compute"]) == (0.0002, 0.0003, 0.002)


async def test_no_trace_unless_asked(rest: Rest) -> None:
    events = await rest.stream("/v1/completions", completion_body(speculation={"mode": "on"}))
    assert not any("easyspec" in event for event in events)
    traced = await rest.stream("/v1/completions", completion_body(speculation={"trace": True, "mode": "off"}))
    assert all(event["easyspec"]["tree"] == {"token_texts": [], "parent_rows": []} for event in traced)


async def test_a_trace_and_usage_go_together(rest: Rest) -> None:
    body = completion_body(speculation={"trace": True}, stream_options={"include_usage": True})
    *rounds, last = await rest.stream("/v1/completions", body)
    assert all("easyspec" in event and event["usage"] is None for event in rounds)
    assert last["usage"]["completion_tokens"] == 60


async def test_a_conversation_is_traced_once_a_round(rest: Rest) -> None:
    events = await rest.stream("/v1/chat/completions", chat_body(speculation={"trace": True}))
    traced = [event for event in events if "easyspec" in event]
    assert len(traced) == len(rest.pair.verifier.trees)
    assert sum(len(event["easyspec"]["token_texts"]) for event in traced) == 60
    # Whatever is said is said in a chunk that tells its round.
    said = [event["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(event["choices"][0]["delta"]["content"] for event in traced) == "".join(said)
