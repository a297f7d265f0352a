"""Entry point of `python -m jzero.bench`."""

import sys

from jzero.bench.main import main

if __name__ == "__main__":
    sys.exit(main())
