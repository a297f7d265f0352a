"""The largest Llama-shaped model that trains on one H100: on the device alone, with host memory, and with a drive.

    python benchmarks/plans_offload.py [--out docs/plans/offload.md]

Closed form: AdamW with fp32 parameters and moments, bf16 compute, remat full, one sequence of 2,048 tokens a microbatch,
attention fused as cuDNN's is. Models have Llama 3's proportions: heads of 128, eight of them for keys and values, an MLP 3.5
times as wide, its vocabulary, and 64 to 136 times as wide as deep (8B, 70B and 405B lie at 102 to 130). What the form was held
against: `benchmarks/plans_compared.py`, docs/plan.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jzero.plan import closed, hosts, names, offloads, room  # noqa: E402
from jzero.plan.job import Job, make  # noqa: E402
from jzero.plan.times import times  # noqa: E402

TARGET, SEQ = "h100:1x1", 2048
WIDTHS = range(1024, 12288 + 1, 512)
MICROBATCHES = (1, 16, 64)
GB = 10**9


class Case(NamedTuple):
    """A machine and what is asked of it."""

    what: str
    offload: str | None
    host_memory: int | None = None
    precision: str = "bf16"


USE = "opt_state=host,params=host,fetch=use"
CASES = (
    Case("device alone", None),
    Case("128 GB host, moments there", "opt_state=host", 128 * GB),
    Case("128 GB host, all state there", "opt_state=host,params=host", 128 * GB),
    Case("1 TB host, all state there", "opt_state=host,params=host", 1000 * GB),
    Case("128 GB host, moments on NVMe", "opt_state=nvme:/data/swap", 128 * GB),
    Case("128 GB host, moments on NVMe, parameters in host memory", "opt_state=nvme:/data/swap,params=host", 128 * GB),
    Case("128 GB host, all state on NVMe", "opt_state=nvme:/data/swap,params=nvme:/data/swap", 128 * GB),
    Case("128 GB host, all state there, bf16-pure", "opt_state=host,params=host", 128 * GB, "bf16-pure"),
    Case("128 GB host, all state there, fetched at use", USE, 128 * GB),
    Case("1 TB host, all state there, fetched at use", USE, 1000 * GB),
    Case("1 TB host, all state there, fetched at use, updated by the host", f"{USE},update=host", 1000 * GB),
    Case(
        "128 GB host, moments on NVMe, parameters fetched at use", "opt_state=nvme:/data/swap,params=host,fetch=use", 128 * GB
    ),
    Case("1 TB host, moments on NVMe, parameters fetched at use", "opt_state=nvme:/data/swap,params=host,fetch=use", 1000 * GB),
)
MOMENTS = Case("1 TB host, moments there", "opt_state=host", 1000 * GB)
EIGHT = Case("1 TB host, all state there", "opt_state=host,params=host", 1000 * GB)
AT_USE, BY_HOST = CASES[9:11]
OFF = (MOMENTS, EIGHT, AT_USE, BY_HOST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plans" / "offload.md")
    args = parser.parse_args()
    largest = {(case, k): best(case, k) for case in CASES for k in MICROBATCHES[:2]}
    rows = [row(case, k, job) for (case, k), job in largest.items()]
    alone, most = largest[CASES[0], 16], largest[AT_USE, 1]
    both = [row(case, k, job_of(case, alone.model, k)) for k in MICROBATCHES[1:] for case in (CASES[0], *OFF)]
    same = [row(case, k, job_of(case, "llama-8b", k)) for case in (EIGHT, AT_USE, BY_HOST) for k in MICROBATCHES]
    times_more = closed.num_params(most.config) / closed.num_params(largest[CASES[0], 1].config)
    said = f"{billions(most)} on one H100 of 80 GB with {most_host(most)} of host memory"
    claimed = (
        f"{said}, {times_more:.1f} times what the device alone trains; {billions(largest[AT_USE, 16])} with 16 microbatches"
    )
    parts = {
        "LARGEST": table(NAMES, rows), "SAME": table(NAMES, both), "EIGHT": table(NAMES, same),
        "ARITHMETIC": arithmetic(*(largest[CASES[number], 16] for number in (3, 4, 6, 9, 10))),
        "ONLAYERS": on_device(largest[AT_USE, 16]), "SPEED8B": speeds("llama-8b"),
        "RATIO16": ratios(alone.model, 16), "RATIO64": ratios(alone.model, 64),
        "CLAIMS": table(("", "claim", "here"), [(*CLAIMS[0], claimed), CLAIMS[1]]),
    }  # fmt: skip
    text = TEXT
    for name, part in parts.items():
        text = text.replace(name, part)
    args.out.write_text(text)
    print(text)


def ratios(model: str, k: int) -> str:
    """Of the device's speed, what is left with moments, and with all state, in host memory."""
    whole = speed_of(CASES[0], model, k)
    return ", ".join(f"{speed_of(case, model, k) / whole:.2f}" for case in OFF)


def speeds(model: str) -> str:
    """Tokens per second with everything in host memory and with fetches at use, by microbatches x sequences in each."""
    cases = {"fetched when a step begins": EIGHT, "fetched at use": AT_USE, "and updated by the host": BY_HOST}
    shapes = [*((k, 1) for k in MICROBATCHES), (1, 16), (1, 32), (4, 32)]
    head = ("", *(f"{k} x {count}" for k, count in shapes))
    every = {name: [job_of(case, model, *shape) for shape in shapes] for name, case in cases.items()}
    said = lambda job: f"{times(job).tokens_per_s_per_device:,.0f}" if fits(job) else "does not fit"
    return table(head, [(name, *map(said, jobs)) for name, jobs in every.items()])


def on_device(job: Job) -> str:
    """What is at the peak where parameters come at their uses, the largest first."""
    parts = closed.memory(job, fused_attention=True).parts.items()
    return ", ".join(f"{name} {size / GB:.1f} GB" for name, size in parts if size >= 0.1 * GB)


def billions(job: Job) -> str:
    return f"{closed.num_params(job.config) / 1e9:.1f}B"


def most_host(job: Job) -> str:
    return f"{room.needs(job)['host'].need / GB:.0f} GB"


def speed_of(case: Case, model: str, k: int) -> float:
    return times(job_of(case, model, k)).tokens_per_s_per_device


def job_of(case: Case, model: str, k: int, sequences: int = 1) -> Job:
    offload, batch = names.offload(case.offload) if case.offload else None, k * sequences
    return make(
        model, TARGET, seq=SEQ, batch=batch, accumulate=k, precision=case.precision, offload=offload,
        host_memory=case.host_memory,
    )  # fmt: skip


def peak_of(job: Job) -> int:
    return closed.memory(job, fused_attention=True).peak_bytes


def best(case: Case, k: int) -> Job:
    """The model with most parameters of those that fit."""
    found = [job for width in WIDTHS if (job := deepest(case, k, width)) is not None]
    return max(found, key=lambda job: closed.num_params(job.config))


def deepest(case: Case, k: int, width: int) -> Job | None:
    """As many layers as fit, within Llama's proportions."""
    low, high = width // 136, width // 64
    if not fits(job_of(case, shaped(width, low), k)):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(job_of(case, shaped(width, middle), k)) else (low, middle - 1)
    return job_of(case, shaped(width, low), k)


def fits(job: Job) -> bool:
    return room.fits(job, room.usable_bytes(TARGET), peak=peak_of(job))


def shaped(width: int, layers: int) -> str:
    heads = width // 128
    kv = next(one for one in (8, 4, 2, 1) if heads % one == 0)
    return f"llama-8b,num_layers={layers},dim={width},num_heads={heads},num_kv_heads={kv},ffn_dim={7 * width // 2}"


NAMES = (
    "machine", "microbatches", "parameters", "width x layers", "device", "host", "disk", "step", "waits for transfers",
    "hidden", "tokens/s", "MFU", "bound by",
)  # fmt: skip


def row(case: Case, k: int, job: Job) -> tuple[str, ...]:
    timed, needs, config = times(job), room.needs(job), job.config
    size = lambda name: f"{needs[name].need / GB:.1f} of {needs[name].have / GB:.0f} GB" if name in needs else "-"
    sent = timed.transfer
    waited = (f"{sent.waited_s:.2f} s", f"{sent.hidden:.0%}") if sent.alone_s else ("-", "-")
    return (
        case.what, str(k), f"{closed.num_params(config) / 1e9:.2f}B", f"{config.dim} x {config.num_layers}",
        f"{peak_of(job) / GB:.1f} GB", size("host"), size("disk"), f"{timed.step_s:.2f} s", *waited,
        f"{timed.tokens_per_s_per_device:,.0f}", f"{timed.mfu:.1%}", timed.bound,
    )  # fmt: skip


def arithmetic(*jobs: Job) -> str:
    """Some rows worked out: what moves over what."""
    lines: list[str] = []
    for job in jobs:
        found, has, timed = offloads.away(job), hosts.room_of(job), times(job)
        assert found is not None
        assert job.offload is not None
        psi, sent = closed.num_params(job.config), timed.transfer
        lines += [f"**{psi / 1e9:.2f}B, {job.accumulate} microbatches, `{names.said_of(job.offload)}`.**", ""]
        tokens = job.batch * job.seq
        lines.append(f"- gradient: {tokens:,} tokens, {timed.compute_s:.2f} s at 80% of the peak, the forward pass again")
        if found.brought:
            rate = min(has.link, has.disk_bandwidth) / GB
            lines.append(f"- from files: 4 Psi = {found.fetched / GB:.1f} GB at {rate:.1f} GB/s = {sent.read_s:.2f} s")
        elif found.fetched >= psi:  # and not only norms
            lines.append(f"- fetch: 4 Psi = {found.fetched / GB:.1f} GB at {has.link / GB:.1f} GB/s = {sent.fetch_s:.2f} s")
        if found.uses.comes:
            comes, left, over = found.uses.comes / GB, found.uses.left / GB, max(0.0, sent.uses_s - timed.compute_s)
            each = found.uses.comes / job.accumulate / psi
            lines.append(
                f"- at their uses: {comes:,.0f} GB come ({each:.1f} Psi a microbatch: parameters twice, the sum so far) while "
                f"{left:,.0f} GB leave, at {has.link / GB:.1f} GB/s each way: {sent.uses_s:.2f} s, of which {over:.2f} s "
                "outlast the gradient"
            )
        by_host = any(trip.by_host for trip in found.trips)
        if by_host:
            rate = has.host_bandwidth / GB
            lines.append(f"- update on the host: 28 Psi = {28 * psi / GB:.1f} GB at {rate:.1f} GB/s = {sent.host_s:.2f} s")
        if found.host_moved and not by_host:
            each, more = found.host_moved / psi, found.sent - found.back
            grads = f" + {more / GB:.1f} GB of gradients" if more else ""
            lines.append(
                f"- update: {each:.0f} Psi = {found.host_moved / GB:.1f} GB each way, in slices that take turns: "
                f"2 x {found.host_moved / GB:.1f} GB{grads} at {has.link / GB:.1f} GB/s = {sent.link_s:.2f} s"
            )
        if found.disk_moved:
            rate = has.disk_bandwidth / GB
            lines.append(
                f"- update: {found.disk_moved / psi:.0f} Psi = {found.disk_moved / GB:.1f} GB read and as much written at "
                f"{rate:.1f} GB/s for both = {2 * found.disk_moved / has.disk_bandwidth:.1f} s, less what fills the pool "
                f"({found.pool / GB:.1f} GB) beside the gradient: {sent.disk_s:.1f} s"
            )
        lines.append(
            f"- step: {timed.compute_s:.2f} + {sent.waited_s:.2f} + {timed.update_s:.2f} (the update's own memory traffic) = "
            f"{timed.step_s:.2f} s; {tokens:,} / {timed.step_s:.2f} = {tokens / timed.step_s:,.0f} tokens/s"
        )
        lines.append("")
    return "\n".join(lines).rstrip()


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


CLAIMS = (
    (
        "ZeRO-Offload (Ren et al., 2021, arXiv:2101.06840)",
        "13B on one V100 of 32 GB in a DGX-2 (1.5 TB of host memory), 10 times what PyTorch alone trains",
    ),
    (
        "ZeRO-Infinity (Rajbhandari et al., 2021, arXiv:2104.07857)",
        "1T fine-tuned on one DGX-2: 16 V100s, 1.5 TB of host memory, NVMe",
        "not reachable: what comes at its use rests in host memory, not in files, beside its gradients: 8 to 12 bytes each",
    ),
)
TEXT = """# How large a model trains on one H100

Made by `python benchmarks/plans_offload.py`: closed form, one H100 of 80 GB (80.7 GB for a program), AdamW with fp32
parameters and moments, bf16 compute, remat full, one sequence of 2,048 tokens a microbatch. Models have Llama 3's
proportions; each row is the largest that fits device, host and disk. 90% of a host's memory counts; PCIe Gen5 at 80% of
63 GB/s; a drive of 3.84 TB whose reads and writes together reach 4 GB/s (`jzero/plan/hosts.py` has the sources). Nothing
here was timed.

LARGEST

The largest that the device alone trains with 16 microbatches, on the device and off it. With 16 microbatches of 2,048
tokens RATIO16 of its speed are left (moments off the device; all state; parameters fetched at their uses; and updated by the
host), where 0.8 is wanted; with 64 RATIO64.

SAME

Llama 8B at three numbers of microbatches:

EIGHT

## The arithmetic

Psi is the number of parameters.

ARITHMETIC

## Beside ZeRO-Offload and ZeRO-Infinity

CLAIMS

Per parameter ZeRO-Offload's GPU holds 2 bytes, its fp16 copy: gradients leave for the host as they appear, and the host's
processors make the update. With `params="host"` alone jzero's device holds 6 with one microbatch (2 for the bf16 copy and 4
for the fp32 gradients, in whose memory the bf16 gradients lie before) and 8 with more (the bf16 gradients of a microbatch
beside the fp32 sums): 80 GB over 6 to 8 bytes is 10 to 13B however much memory the host has. With `fetch="use"` it holds
none of them for the layers and the tables, and what is on the device does not grow with the number of layers but for their
saved inputs. Host memory is the limit then: 16 bytes a parameter (12 of state, 4 of gradients), and 20 with several
microbatches, for a sum is made beside the old one. On the device in the 1 TB row with 16 microbatches:

- ONLAYERS

It costs the link 8 bytes a parameter and microbatch of fetches (the head 4) and 4 of gradients the other way; with several
microbatches 4 more for the sums. That hides behind the gradient where a microbatch has tokens enough: at one sequence of 2,048
it does not. So larger microbatches, which the freed memory allows, rather than more. Llama 8B in tokens/s, by microbatches x
sequences in each:

SPEED8B

How far this is checked: on v5e (`benchmarks/plans_compared.py`), whose compiler shows memories; the peak of two programs of a
1B model on four chips was planned +1.0% and -2.2%, that of one with tables of its own on one chip, at two microbatches, -11%.
The GPU compiler without a device does not tell memories apart, so the rows for H100 are the TPU's rules.

What is missing, and what each would free:

- **One sum in host memory instead of two**: 4 bytes there with several microbatches.
- **Moments on NVMe beside parameters in host memory** go whole leaf by whole leaf, not in slices (`by_slices.py` slices only
  where parameters rest on the device or in files too), and the pool is four of the largest: a row of the table shows what is
  left. With parameters on NVMe as well all of it goes by rows, for 8 bytes a parameter more read and 4 more written.
- **Slices that leave while others arrive** would hide one direction, as whole buckets do: at most half of the update's time. A
  model whose layers are a list (`models.build(..., scan_layers=False)`) with a `bucket_bytes` that holds a leaf of one layer
  gets that today; plans count stacked layers.
"""


if __name__ == "__main__":
    main()
