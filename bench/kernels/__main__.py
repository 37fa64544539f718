"""`python -m bench.kernels` is `python -m bench kernels`."""

import sys

from bench.__main__ import main

sys.exit(main(["kernels", *sys.argv[1:]]))
