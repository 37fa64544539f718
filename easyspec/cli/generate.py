"""`easyspec generate`: the completion to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console
from rich.style import Style
from rich.table import Table

from easyspec.cli.clients import (
    Completion,
    GatewayAccess,
    GatewayClient,
    GenerateFlags,
    GenerateResponse,
    finish_reason_name,
)

_ACCEPTED_STYLE = Style(color="green")
_BONUS_STYLE = Style(color="yellow", bold=True)


@dataclass(frozen=True)
class Display:
    """How a completion is shown: `is_coloured` tells guesses and bonus tokens apart, `compares` decodes it once more
    without speculation, silently, and prints that speed too."""

    is_coloured: bool = False
    compares: bool = False


async def stream_completion(
    gateway_address: str, flags: GenerateFlags, display: Display, access: GatewayAccess
) -> None:
    """Print the completion as it comes, then a table of statistics on stderr; raises EasyspecError."""
    rounds: list[GenerateResponse] = []
    plain: list[GenerateResponse] = []
    async with GatewayClient(gateway_address, access) as client:
        async with aclosing(client.generate(flags)) as responses:
            async for response in responses:
                print(coloured(response) if display.is_coloured else response.text, end="", flush=True)
                rounds.append(response)
        is_line_open = not (rounds and rounds[-1].text.endswith("\n"))
        if is_line_open and sys.stdout.isatty():
            print(file=sys.stderr, flush=True)
        if display.compares and rounds:
            seeded = dataclasses.replace(flags.sampling, seed=rounds[-1].completion.seed)
            request = dataclasses.replace(flags, is_drafting=False, sampling=seeded)
            async with aclosing(client.generate(request)) as responses:
                plain = [response async for response in responses]
    if rounds and rounds[-1].HasField("completion"):
        if display.is_coloured:
            legend = f"{_ACCEPTED_STYLE.render('guessed and accepted')}, {_BONUS_STYLE.render('its own tokens')}"
            print(f"\nthe model's words: {legend}", file=sys.stderr, flush=True)
        Console(stderr=True).print(statistics_table(rounds, rounds[-1].completion, plain))


def coloured(response: GenerateResponse) -> str:
    """The round's text, accepted draft tokens and the bonus token each in their colour."""
    token_texts = list(response.token_texts)
    if "".join(token_texts) != response.text:
        # A character or a stop string spans rounds: the text has no one-to-one relation to this round's tokens.
        style = _ACCEPTED_STYLE if response.num_accepted == len(response.token_ids) else _BONUS_STYLE
        return style.render(response.text)
    styles = [_ACCEPTED_STYLE if i < response.num_accepted else _BONUS_STYLE for i in range(len(token_texts))]
    return "".join(style.render(text) for style, text in zip(styles, token_texts, strict=True))


def statistics_table(
    rounds: list[GenerateResponse], completion: Completion, plain: Sequence[GenerateResponse] = ()
) -> Table:
    """What a completion came to; `plain` is the same one without speculation."""
    statistics = completion.speculation
    levels = zip_longest(statistics.num_accepted_by_level, statistics.num_drafted_by_level, fillvalue=0)
    compared = {}
    if plain:
        is_same = [t for one in rounds for t in one.token_ids] == [t for one in plain for t in one.token_ids]
        speed, plain_speed = _speed(rounds), _speed(plain)
        times = f"{speed / plain_speed:.2f} times as fast with it" if speed and plain_speed else "too short to compare"
        tokens = "the same tokens" if is_same else "OTHER TOKENS, which is a bug"
        compared["without speculation"] = f"{_number(plain_speed)}: {times}, {tokens}"
    rows = {
        "finish reason": finish_reason_name(completion),
        "tokens": f"{completion.usage.num_prompt_tokens} in, {completion.usage.num_output_tokens} out",
        "time to first token": f"{statistics.time_to_first_token_ns / 1e6:.1f} ms",
        "tokens/s after it": _number(_speed(rounds)),
        **compared,
        "rounds": f"{statistics.num_rounds}, {statistics.num_draft_rounds} of them drafted",
        "acceptance rate": _ratio(statistics.num_accepted_tokens, statistics.num_draft_tokens, "{:.1%}")
        + f" ({statistics.num_accepted_tokens} of {statistics.num_draft_tokens} draft tokens)",
        "mean acceptance length": f"{statistics.mean_acceptance_length:.2f}",
        "acceptance by level": " ".join(_ratio(accepted, drafted, "{:.0%}") for accepted, drafted in levels) or "-",
        "per round": _per_round(rounds),
        "drafter failures": str(statistics.num_drafter_failures),
        "seed": str(completion.seed),
    }
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _speed(rounds: Sequence[GenerateResponse]) -> float | None:
    """Tokens per second after the first round, which holds the prompt; None if there is no other."""
    completion = rounds[-1].completion
    num_later_tokens = completion.usage.num_output_tokens - len(rounds[0].token_ids)
    total_ns = completion.speculation.total_ns
    return num_later_tokens * 1e9 / total_ns if total_ns and num_later_tokens else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _per_round(rounds: list[GenerateResponse]) -> str:
    # The first round holds the prompt.
    timings = [response.timings for response in rounds[1:]]
    if not timings:
        return "-"
    draft_ns, verify_ns = sum(t.draft_ns for t in timings), sum(t.verify_ns for t in timings)
    total_ns = sum(t.round_ns for t in timings)
    parts = {"draft": draft_ns, "verify": verify_ns, "gateway": total_ns - draft_ns - verify_ns}
    return ", ".join(f"{name} {value / len(timings) / 1e6:.2f} ms" for name, value in parts.items())


def _ratio(numerator: float, denominator: float, form: str) -> str:
    return form.format(numerator / denominator) if denominator else "-"
