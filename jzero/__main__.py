"""`jzero bench` is `python -m jzero.bench`, and so for every command."""

import runpy
import sys

from jzero._errors import explain, suggest

COMMANDS = {
    "bench": "train GPT-2 or Llama under plain JAX and stages 0 to 3, side by side",
    "launch": "start a script as several local processes, and again after a death",
    "plan": "what a run would need of devices that are not there",
    "doctor": "what this machine has, what it lacks, and how to get it",
    "checkpoint": "list, verify, compare and export checkpoints",
}


def main() -> None:
    """Run the command that the first argument names, with the rest of them."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: jzero COMMAND ...\n", *(f"  {command:8}{what}" for command, what in COMMANDS.items()), sep="\n")
    elif name in COMMANDS:
        sys.argv[:2] = [f"jzero {name}"]
        runpy.run_module(f"jzero.{name}", run_name="__main__", alter_sys=True)
    else:
        sys.exit(explain("jzero", f"no command {name!r}", fix=suggest(name, COMMANDS)))


if __name__ == "__main__":
    main()
