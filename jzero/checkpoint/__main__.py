"""Entry point of `python -m jzero.checkpoint`."""

import sys

from jzero.checkpoint.main import main

if __name__ == "__main__":
    sys.exit(main())
