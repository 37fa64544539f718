"""`python -m easyspec.cli.child STARTER ARGUMENTS`: Python with these arguments, killed when its starter ends.

The kernel does that, so that it works however the starter ends. Asked for here and not between fork and exec, where
the starter's threads would be in the way.
"""

from __future__ import annotations

import os
import sys

from easyspec.parallel.launch import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it has ended meanwhile
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
