"""Pages are made from result files, and the committed ones are what the committed files say."""

from __future__ import annotations

import json

from bench.report.report import RESULTS, details, kind_of, overview


def test_every_committed_page_is_what_its_file_says() -> None:
    reports = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    kinds = {name: kind for name in reports if (kind := kind_of(name)) is not None}
    assert len(kinds) > 10
    for name, kind in kinds.items():
        page = RESULTS.joinpath(name).with_suffix(".md").read_text("utf-8")
        assert page == details(kind, name, reports[name]), f"run python -m bench.report ({name})"
    assert RESULTS.with_suffix(".md").read_text("utf-8") == overview(reports)


def test_a_file_of_another_kind_has_no_page() -> None:
    assert kind_of("gloo-rounds.json") is None
    assert kind_of("exits.json") is kind_of("sources-bundled.json") is not None


def test_without_results_the_document_says_so() -> None:
    assert overview({}).endswith("No results yet: `make bench` makes some.\n")
