"""The figures of a finished bench as plain data: what `--json` writes and table and picture show."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jzero.attention import choose_attention
from jzero.bench.contenders import Trial
from jzero.bench.peak import Peak
from jzero.bench.setup import Setup
from jzero.bench.training import milliseconds, versions
from jzero.mesh import axis_size
from jzero.models import FLOPS_FORMULA
from jzero.precision import get as get_precision


def results(setup: Setup, trials: Sequence[Trial], peak: Peak, *, simulated: bool, words: Sequence[str]) -> dict[str, Any]:
    """One dict for JSON: `{"runs": [...], "device", "versions", "command"}` and what all runs share."""
    return {
        "runs": [_run(setup, trial, peak) for trial in trials],
        "device": device_name(setup, simulated=simulated),
        "versions": versions(),
        "command": shlex.join(["python", "-m", "jzero.bench", *words]),
        "shared": _shared(setup, peak, simulated=simulated),
    }


def device_name(setup: Setup, *, simulated: bool) -> str:
    """`8 x NVIDIA H100 80GB HBM3`, or that the devices are simulated."""
    kind, num = setup.mesh.devices.flat[0].device_kind, setup.num_devices
    return f"{num} simulated CPU devices" if simulated else f"{num} x {kind}" if num > 1 else kind


def _run(setup: Setup, trial: Trial, peak: Peak) -> dict[str, Any]:
    step_time = milliseconds(trial.seconds)
    rate = setup.batch * setup.seq / setup.num_devices / (step_time["median"] / 1e3)
    return {
        "model": setup.options.model,
        "stage": trial.stage,
        "mesh": dict(setup.mesh.shape),
        "precision": setup.precision,
        "loss_first": trial.losses[0],
        "loss_last": trial.losses[-1],
        "step_time_ms": step_time,
        "tokens_per_s_per_device": rate,
        "mfu": rate * setup.model.flops_per_token(setup.seq) / peak.flops,
        "flops_formula": FLOPS_FORMULA,
        **trial.costs,
        "peak_bytes": _peak_bytes(trial.costs, setup),
        "losses": trial.losses,
    }


def _peak_bytes(costs: Mapping[str, Any], setup: Setup) -> int:
    """The compiler's figure; XLA:CPU leaves temporaries out of it, so there at least what rests plus those."""
    if setup.mesh.devices.flat[0].platform != "cpu":
        return costs["peak_bytes"]
    resting = sum(figure["measured"] for figure in costs["bytes_at_rest"].values())
    return max(costs["peak_bytes"], resting + costs["temp_bytes"])


def _attention(setup: Setup) -> str:
    config, dtype = setup.model.config, get_precision(setup.precision).compute
    heads = config.num_heads, getattr(config, "num_kv_heads", config.num_heads)
    q, k = (jax.ShapeDtypeStruct((1, setup.seq, num, config.head_dim), dtype) for num in heads)
    computed = choose_attention(q, k, device_kind=setup.mesh.devices.flat[0].device_kind)
    return f"{computed}; {setup.attention_kind} over 'sequence'" if axis_size(setup.mesh, "sequence") > 1 else computed


def _shared(setup: Setup, peak: Peak, *, simulated: bool) -> dict[str, Any]:
    options = setup.options
    return {
        "num_params": setup.model.num_params,
        "vocab_rows": setup.model.config.padded_vocab_size,
        "batch": setup.batch,
        "seq": setup.seq,
        "accumulate": setup.accumulate,
        "remat": options.remat,
        "steps": options.steps,
        "seed": options.seed,
        "optimizer": f"adamw, learning rate {options.learning_rate:g} after a linear warmup",
        "data": options.data or "Python's documentation (pydoc_data.topics)",
        "attention": _attention(setup),
        "peak_flops_per_device": peak.flops,
        "peak_source": peak.source,
        "simulated": simulated,
        "num_processes": jax.process_count(),
    }
