"""Plans with offload and with the axes sequence and expert, held against programs that the compilers made.

    python benchmarks/plans_compared.py --json benchmarks/results/plans-offload-axes.json     # compile what the file lacks
    python benchmarks/plans_compared.py --json benchmarks/results/plans-offload-axes.json --table-only

What rests, every bucket and what moves is to be equal; how far the peak and the wire are apart is printed. Models are cut to
few layers, so that a compilation ends on two cores; TPU programs take minutes (they alone show memory kinds).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import recorded

# model, target, and what `python -m jzero.plan` calls --seq, --mesh, --batch, --accumulate, --offload
LINES = """
llama-1b h100:1x1 seq=2048 offload=opt_state=host
llama-1b h100:1x1 seq=2048 batch=4 accumulate=4 offload=opt_state=host
llama-1b h100:1x1 seq=2048 offload=opt_state=host,params=host
llama-1b,num_layers=8 h100:1x1 seq=2048 offload=opt_state=nvme:swap
llama-1b,num_layers=8 v5e:2x2 seq=2048 offload=opt_state=host,params=host
llama-1b,num_layers=8 v5e:2x2 seq=2048 offload=opt_state=host,params=host,fetch=use
llama-1b,num_layers=4 v5e:2x2 seq=2048 batch=16 accumulate=4 offload=opt_state=host,params=host,fetch=use
llama-1b,num_layers=4 v5e:2x2 seq=2048 offload=opt_state=host,update=host
llama-1b,num_layers=4 v5e:2x2 seq=2048 remat=dots
llama-1b,num_layers=4 v5e:2x2 seq=2048 offload=activations=host
llama-1b,num_layers=8 h100:1x8 seq=2048 mesh=data=2,sequence=4
llama-8b,num_layers=2 h100:1x8 seq=2048 mesh=data=2,sequence=4
llama-8b,num_layers=8 h100:1x8 seq=8192 mesh=data=2,sequence=4
llama-8b,num_layers=2,num_heads=20,num_kv_heads=4,dim=2560,ffn_dim=7168 h100:1x8 seq=4096 mesh=data=1,sequence=8
mixtral-8x7b,num_layers=2 h100:1x8 seq=2048 mesh=data=2,expert=4
mixtral-8x7b,num_layers=2 h100:1x8 seq=2048 mesh=data=4,expert=2
"""
KEPT = ("at_rest", "wire", "temp_bytes", "peak_bytes", "compile_s", "host_bytes", "offload")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="compiled figures: read, and added to")
    parser.add_argument("--table-only", action="store_true", help="compile nothing")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not args.table_only:
        recorded.fill(args.json, recorded.lines(LINES), compile_line)
    print(table(recorded.read(args.json)["rows"]))


def compile_line(line: str) -> dict[str, Any]:
    from jzero.plan.compiled import compile_job

    answer = compile_job(job_of(line))
    return {key: answer[key] for key in KEPT if key in answer}


def job_of(line: str) -> Any:
    from jzero import mesh
    from jzero.plan import names
    from jzero.plan.job import make

    model, target, *words = line.split()
    asked: dict[str, Any] = dict(word.split("=", 1) for word in words)
    readers = {"mesh": lambda text: mesh.parse(text, who="plans_compared"), "offload": names.offload, "remat": str}
    return make(model, target, **{name: readers.get(name, int)(text) for name, text in asked.items()})


def table(rows: dict[str, Any]) -> str:
    from jzero.plan import closed

    head = "| job | peak, compiled | closed | apart | wire, compiled | closed | apart |\n|---|---|---|---|---|---|---|"
    body = []
    for line, row in rows.items():
        job = job_of(line)
        peak, moved = closed.memory(job).peak_bytes, total(closed.wire(job))
        cells = [line, *compared(row["peak_bytes"], peak), *compared(total(row["wire"]), moved)]
        body.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *body])


def compared(compiled: int, closed: int) -> tuple[str, str, str]:
    return f"{compiled / 1e6:,.0f} MB", f"{closed / 1e6:,.0f} MB", f"{closed / compiled - 1:+.1%}" if compiled else "-"


def total(wire: dict[str, dict[str, int]]) -> int:
    return sum(sum(kinds.values()) for kinds in wire.values())


if __name__ == "__main__":
    main()
