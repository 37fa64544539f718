"""axe-core, the usual automatic check of accessibility, from the npm registry; it runs inside the page."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.browser.chromium import Page

_PACKAGE = "axe-core@4.14.1"
_TIMEOUT_S = 60


@functools.cache
def axe_source() -> str | None:
    """Its script; None where npm cannot get it."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", _PACKAGE, "--silent", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            script = packed.extractfile("package/axe.min.js")
            assert script is not None
            return script.read().decode()


async def violations(page: Page) -> list[str]:
    """What axe finds on the page as it stands, a line each."""
    source = axe_source()
    assert source is not None
    await page.evaluate(f"{source}; null")
    found: list[dict[str, Any]] = await page.evaluate("axe.run(document).then(result => result.violations)")
    return [f"{one['id']}: {one['help']}: {node['html'][:160]}" for one in found for node in one["nodes"]]
