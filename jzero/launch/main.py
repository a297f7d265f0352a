"""The launcher from command line to exit code."""

import asyncio
import sys
from collections.abc import Sequence

from jzero.launch import codes
from jzero.launch.options import parse
from jzero.launch.supervise import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job; its exit code."""
    try:
        options = parse(argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return codes.USAGE

    async def job() -> int:
        return await Supervisor(options).run()

    return asyncio.run(job())
