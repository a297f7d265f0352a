"""Entry point of `python -m jzero.plan`."""

import sys

from jzero.plan.main import main

if __name__ == "__main__":
    sys.exit(main())
