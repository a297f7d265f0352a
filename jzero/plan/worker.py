"""The exact program of a job, compiled for described devices. Runs as a process of its own: a request comes in, figures go out.

`python -m jzero.plan.worker` reads one JSON line and prints one; everything else that it says goes to stderr.
"""

import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jzero import models
from jzero.mesh import make_mesh
from jzero.models import gpt2, llama, mixtral
from jzero.plan.job import Job
from jzero.plan.own import figures_of
from jzero.shard import shard
from jzero.step import make_train_step
from jzero.topology import topology


def measure(job: Job) -> dict[str, Any]:
    """The report of the job's step, compiled and not run, with what the compilation took."""
    start = time.perf_counter()
    mesh = make_mesh(**job.mesh, devices=topology(job.target))
    model = models.build(job.config, attention_kind=job.attention_kind)
    loss, arrange = models.pipeline(model) if job.pipe > 1 else (model.loss, lambda params: params)
    rules = rules_of(job)
    train_step = make_train_step(loss, optax.adamw(3e-4), precision=job.precision, accumulate=job.accumulate)
    step = shard(
        train_step, stage=job.stage, mesh=mesh, remat=job.remat, rules=rules, schedule=job.schedule, offload=job.offload,
        strict=False,
    )  # fmt: skip
    state = jax.eval_shape(lambda key: train_step.init(arrange(model.init(key))), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((job.batch, job.seq + 1), jnp.int32)
    found = figures_of(step, state, (tokens,))
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kibibytes
    return found | {"compile_s": time.perf_counter() - start, "host_bytes": peak_rss}


def rules_of(job: Job) -> Any:
    """The models' own tables, for the axes that the mesh has."""
    if isinstance(job.config, models.MixtralConfig):
        return mixtral.tensor_rules if job.tensor > 1 else mixtral.expert_rules if job.expert > 1 else ()
    return (gpt2 if isinstance(job.config, models.GPT2Config) else llama).tensor_rules if job.tensor > 1 else ()


def main() -> None:
    """One request, one answer; a failure the user can mend is an answer too."""
    job = Job.of(json.loads(sys.stdin.readline()))
    try:
        answer = measure(job)
    except (ValueError, TypeError, NotImplementedError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
