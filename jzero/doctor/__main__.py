"""Entry point of `python -m jzero.doctor`."""

import argparse
import json
from pathlib import Path

from jzero.doctor.diagnosis import doctor


def main() -> None:
    """Print the diagnosis."""
    parser = argparse.ArgumentParser(prog="python -m jzero.doctor", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write it as JSON")
    asked = parser.parse_args()
    found = doctor()
    print(found)
    if asked.json:
        Path(asked.json).write_text(json.dumps(found.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
