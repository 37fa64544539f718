"""What is started on a machine with GPUs, which are made up here, and on this one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from easyspec.cli.planning import planned
from easyspec.cli.processes import DEFAULT_BASE, DRAFTER, GATEWAY, VERIFIER, StackSettings
from easyspec.planner.gpus import Gpu
from easyspec.planner.placement import Wishes
from tests.cli.conftest import CHECKOUT

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30)
SETTINGS = StackSettings(flags={GATEWAY: ("--log-level", "warning"), DRAFTER: ("--log-level", "debug")})
NOTHING: dict[str, str] = {}


def has_gpus(monkeypatch: pytest.MonkeyPatch, gpus: Sequence[Gpu]) -> None:
    monkeypatch.setattr("easyspec.planner.gpus.detect_gpus", lambda: tuple(gpus))


def value_of(settings: StackSettings, role: str, flag: str) -> str:
    flags = list(settings.flags[role])
    return flags[flags.index(flag) + 1]


def test_without_gpus_nothing_is_changed_but_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch, [])
    settings, placement = planned(SETTINGS, Wishes(), NOTHING)
    assert settings.num_ranks == {VERIFIER: 1, DRAFTER: 1}
    assert {role: tuple(flags) for role, flags in settings.flags.items() if flags} == SETTINGS.flags
    assert str(placement) == "verifier on 1 rank, drafter on 1 rank: no GPU here"
    settings, _ = planned(SETTINGS, Wishes(tensor_parallel_size=2, mlp="sequential"), NOTHING)
    assert settings.num_ranks == {VERIFIER: 2, DRAFTER: 1}
    assert list(settings.flags[DRAFTER]) == ["--log-level", "debug", "--mlp", "sequential"]


def test_on_gpus_ranks_layer_plan_and_pools_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch, [H100] * 2)
    settings, placement = planned(SETTINGS, Wishes(), NOTHING)
    assert placement.is_for_gpus
    assert settings.num_ranks == {VERIFIER: placement.verifier_ranks, DRAFTER: placement.drafter_ranks}
    assert value_of(settings, DRAFTER, "--log-level") == "debug"
    assert value_of(settings, DRAFTER, "--layer-parallel-size") == placement.layer_flags["--layer-parallel-size"]
    pools = [value_of(settings, role, "--num-kv-slots") for role in (VERIFIER, DRAFTER)]
    assert pools == [str(placement.num_kv_slots)] * 2
    assert settings.flags[GATEWAY] == SETTINGS.flags[GATEWAY]


def test_flags_win_over_the_environment_and_both_over_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch, [H100] * 4)
    environment = {
        "EASYSPEC_DRAFTER_LAYER_PARALLEL_SIZE": "6",
        "EASYSPEC_DRAFTER_MLP": "sequential",
        "EASYSPEC_VERIFIER_KV_MEMORY_FRACTION": "0.3",
    }
    settings, _ = planned(SETTINGS, Wishes(tensor_parallel_size=4, mlp="staged"), environment)
    assert settings.num_ranks[VERIFIER] == 4
    assert value_of(settings, DRAFTER, "--layer-parallel-size") == "6"
    assert value_of(settings, DRAFTER, "--mlp") == "staged"
    assert "--num-kv-slots" not in settings.flags[VERIFIER]
    assert "--num-kv-slots" in settings.flags[DRAFTER]
    settings, _ = planned(SETTINGS, Wishes(), {"EASYSPEC_DRAFTER_LAYER_GROUPS": "0 | 1-2 | 3-6 | 7"})
    assert not {"--layer-parallel-size", "--mlp"} & set(settings.flags[DRAFTER])


def test_roles_on_the_cpu_and_replicas_are_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpus(monkeypatch, [H100] * 4)
    on_cpu = {"EASYSPEC_DRAFTER_DEVICE": "cpu", "EASYSPEC_VERIFIER_DEVICE": "cpu"}
    _, placement = planned(SETTINGS, Wishes(), on_cpu)
    assert "CPU" in placement.reason
    for settings in (StackSettings(num_verifiers=2), StackSettings(also={"second": DEFAULT_BASE})):
        _, placement = planned(settings, Wishes(), NOTHING)
        assert "several verifiers" in placement.reason
    _, placement = planned(StackSettings(draft=None), Wishes(), NOTHING)
    assert not placement.has_drafter


def test_up_says_what_it_chose_and_starts_that() -> None:
    """The command itself on two GPUs that are made up, with fakes for services that print how they were started."""
    script = textwrap.dedent(f"""
        import dataclasses, sys
        from easyspec.cli import main
        from easyspec.planner import gpus
        gpus.detect_gpus = lambda: (gpus.Gpu({H100.name!r}, {H100.memory_bytes}),) * 2
        async def shown(settings):
            print("started:", dict(settings.num_ranks), list(settings.flags["drafter"]), file=sys.stderr)
        main.serve_until_cancelled = shown
        sys.argv = ["easyspec", "up", *sys.argv[1:]]
        main.main()
    """)

    def up(*flags: str) -> list[str]:
        command = [sys.executable, "-c", script, *flags]
        ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        return [line for line in ended.stderr.splitlines() if not line.startswith("no model is named")]

    plan, started = up("--tensor-parallel-size", "2", "--drafter-ranks", "2", "--layer-parallel-size", "3")
    assert plan.startswith("plan: verifier on 2 ranks, drafter on 2 ranks --layer-parallel-size 3")
    assert "2 x h100 and --tensor-parallel-size 2 --drafter-ranks 2 --layer-parallel-size 3" in plan
    assert "{'verifier': 2, 'drafter': 2}" in started
    assert "'--layer-parallel-size', '3'" in started


def test_a_base_that_fits_nowhere_ends_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has_gpus(monkeypatch, [Gpu("NVIDIA L4", 2**20)])
    with pytest.raises(Exception, match="gpus is 1; allowed: more: the base needs"):
        planned(SETTINGS, Wishes(), NOTHING)
