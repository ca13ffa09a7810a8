"""Starts a server: `python scripts/launch.py MODEL --tensor-parallel-size 2`, the same as `treadle serve`."""

import sys

from treadle.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
