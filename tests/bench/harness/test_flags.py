"""A settings dataclass is a command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest

from bench.harness.flags import flag, one_by_one, parse_settings


@dataclass(frozen=True)
class Settings:
    """Of a made-up benchmark."""

    QUICK: ClassVar = {"num_prompts": 2, "rows": (1,)}

    rows: Annotated[tuple[int, ...], flag("Rows.")] = (1, 4, 8)
    num_prompts: Annotated[int, flag("Prompts.", minimum=1)] = 8
    mix: Annotated[str, flag("Mix.", choices=("mixed", "tiny"))] = "mixed"
    budget: Annotated[tuple[int, int] | None, flag("Tree.")] = None
    is_bare: Annotated[bool, flag("Bare.")] = False


def parsed(*argv: str) -> tuple[Settings, Any]:
    return parse_settings(Settings, "bench made-up", "Made up.", argv)


def test_without_flags_defaults_hold() -> None:
    assert parsed() == (Settings(), None)


def test_flags_have_the_names_and_types_of_fields() -> None:
    settings, path = parsed("--budget", "5", "4", "--is-bare", "--mix", "tiny", "--json", "a/b.json")
    assert settings == Settings(budget=(5, 4), is_bare=True, mix="tiny")
    assert path == Path("a/b.json")


@pytest.mark.parametrize("argv", [["--rows", "2", "3"], ["--rows", "2", "--rows", "3"], ["--rows=2", "--rows", "3"]])
def test_a_list_may_follow_its_flag_or_repeat_it(argv: list[str]) -> None:
    assert parsed(*argv, "--num-prompts", "5") == (Settings(rows=(2, 3), num_prompts=5), None)


def test_quick_replaces_defaults_and_nothing_that_was_said() -> None:
    assert parsed("--quick")[0] == Settings(rows=(1,), num_prompts=2)
    assert parsed("--quick", "--num-prompts", "7")[0] == Settings(rows=(1,), num_prompts=7)


@pytest.mark.parametrize("argv", [["--rows"], ["--num-prompts", "0"], ["--mix", "other"], ["--unknown"], ["word"]])
def test_what_is_wrong_ends_with_two(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(*argv)
    assert ended.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_values_of_other_flags_stay_where_they_are() -> None:
    assert one_by_one(["--a", "1", "2", "--b", "3", "4"], {"--a"}) == ["--a", "1", "--a", "2", "--b", "3", "4"]
