"""What `up`, `generate` and `chat` start unless flags say it: the planner's answer for the GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from easyspec.cli.processes import DRAFTER, VERIFIER, StackSettings
from easyspec.planner import gpus
from easyspec.planner.placement import Placement, Wishes, as_asked, place
from easyspec.planner.shape import find_shape

_ENVIRONMENT = {VERIFIER: "EASYSPEC_VERIFIER_", DRAFTER: "EASYSPEC_DRAFTER_"}
_GROUP_FLAGS = ("--layer-parallel-size", "--mlp")


def planned(
    settings: StackSettings, wishes: Wishes, environment: Mapping[str, str] | None = None
) -> tuple[StackSettings, Placement]:
    """The settings with ranks and flags of a plan, and the plan; flags win over `environment`, and both over the plan.

    Raises ConfigurationError for a checkpoint of which there is no plan, InvalidRequestError if the base fits nowhere.
    """
    settings.check()
    environment = os.environ if environment is None else environment

    def given(role: str, name: str) -> str | None:
        return environment.get(_ENVIRONMENT[role] + name.upper())

    size = given(DRAFTER, "layer_parallel_size")
    wishes = replace(
        wishes,
        layer_parallel_size=wishes.layer_parallel_size or (int(size) if size and size.isdecimal() else None),
        mlp=wishes.mlp or given(DRAFTER, "mlp"),
        rank_placement=wishes.rank_placement or given(DRAFTER, "rank_placement"),
    )
    placement = _placement(settings, wishes, is_for_cpu=all(given(role, "device") == "cpu" for role in _ENVIRONMENT))
    layer_flags = dict(placement.layer_flags)
    if given(DRAFTER, "layer_groups") is not None:  # says which layers run at the same time
        for flag in _GROUP_FLAGS:
            layer_flags.pop(flag, None)
    flags = dict(settings.flags)
    for role, role_flags in ((VERIFIER, {}), (DRAFTER, layer_flags)):
        of_role = [*flags.get(role, ()), *(part for pair in role_flags.items() for part in pair)]
        # Both roles share the GPUs: by itself each would take most of what is free when it comes to its pool.
        is_pool_set = any(given(role, name) is not None for name in ("num_kv_slots", "kv_memory_fraction"))
        if placement.num_kv_slots is not None and not is_pool_set:
            of_role += ["--num-kv-slots", str(placement.num_kv_slots)]
        flags[role] = of_role
    num_ranks = {VERIFIER: placement.verifier_ranks, DRAFTER: placement.drafter_ranks}
    draft = settings.draft if placement.has_drafter else None
    return replace(settings, draft=draft, flags=flags, num_ranks=num_ranks), placement


def _placement(settings: StackSettings, wishes: Wishes, *, is_for_cpu: bool) -> Placement:
    if wishes.is_complete:
        placement = as_asked(wishes, "as asked")
    elif is_for_cpu:
        placement = as_asked(wishes, "both roles are to run on the CPU")
    elif not (found := gpus.detect_gpus()):
        placement = as_asked(wishes, "no GPU here")
    elif settings.num_verifiers > 1 or settings.also:
        placement = as_asked(wishes, "several verifiers share the GPUs, which is not planned for")
    else:
        draft = None if settings.draft is None else find_shape(str(settings.draft))
        return place(find_shape(str(settings.base)), draft, found, wishes)
    return replace(placement, has_drafter=settings.draft is not None or settings.drafts_from_text)
