"""Entry point of `python -m jzero.launch`."""

import sys

from jzero.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
