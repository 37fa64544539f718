"""`easyspec bench`: measurements, which are a part of the checkout and read their own flags."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from easyspec.cli.processes import CHECKOUT
from easyspec.errors import ConfigurationError

# For a command that hands all of its arguments on.
OWN_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def run_bench(arguments: Sequence[str]) -> int:
    """Run what `python -m bench` runs; returns its exit code. Raises EasyspecError."""
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    try:
        commands = importlib.import_module("bench.__main__")
    except ModuleNotFoundError as error:
        if error.name not in ("bench", "bench.__main__"):
            raise
        raise ConfigurationError("the benchmarks are part of the checkout, which is not here") from error
    return int(commands.run(arguments))
