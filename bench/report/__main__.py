"""`python -m bench.report` is `python -m bench report`."""

import sys

from bench.__main__ import main

sys.exit(main(["report", *sys.argv[1:]]))
