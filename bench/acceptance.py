"""`python -m bench.acceptance` is `python -m bench acceptance`."""

import sys

from bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["acceptance", *sys.argv[1:]]))
