"""A job as the Python to paste."""

from typing import Any

from jzero.models import GPT2Config, MixtralConfig
from jzero.plan import names
from jzero.plan.job import Job


def python_of(job: dict[str, Any]) -> str:
    """The lines that build the model, the step and its state; `job` as `Job.to_dict` has it."""
    one = Job.of(job)
    mesh = ", ".join(f"{axis}={size}" for axis, size in one.mesh.items())
    schedule = f', schedule="{one.schedule}"' if one.pipe > 1 else ""
    offload = f", offload=jzero.{one.offload}" if one.offload else ""
    init = "train_step.init(arrange(model.init(key)))" if one.pipe > 1 else "train_step.init(model.init(key))"
    more = f"{_rules(one)}{schedule}{offload}"
    kind = ', attention_kind="ring"' if one.attention_kind == "ring" else ""
    return "\n".join(
        [
            "import jax",
            "import optax",
            "",
            "import jzero",
            "from jzero import models",
            "",
            f"model = {names.python_of(one.model)}{kind})",
            *(["loss, arrange = models.pipeline(model)"] if one.pipe > 1 else []),
            "train_step = jzero.make_train_step(",
            f'    {"loss" if one.pipe > 1 else "model.loss"}, optax.adamw(3e-4), precision="{one.precision}", '
            f"accumulate={one.accumulate}",
            ")",
            f"mesh = jzero.make_mesh({mesh})",
            f'step = jzero.shard(train_step, stage={one.stage}, mesh=mesh, remat="{one.remat}"{more})',
            f"state = step.init(lambda key: {init}, jax.random.key(0))",
            f"# state, metrics = step(state, tokens), tokens: int32[{one.batch}, {one.seq + 1}]",
        ]
    )


def _rules(job: Job) -> str:
    """The models' own tables, for the axes that the mesh has (`worker.rules_of`)."""
    if job.tensor == job.expert == 1:
        return ""
    family = "gpt2" if isinstance(job.config, GPT2Config) else "mixtral" if isinstance(job.config, MixtralConfig) else "llama"
    return f", rules=models.{family}.{'tensor' if job.tensor > 1 else 'expert'}_rules"
