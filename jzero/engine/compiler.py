"""Compiler settings that a correct program needs, back end by back end. None is a tuning."""

from jax.sharding import Mesh


def options(mesh: Mesh) -> dict[str, str]:
    """Settings for compiling a step on this mesh.

    On several simulated CPU devices collectives must run in program order: JAX gives all of a `shard_map`'s collectives one
    channel id, XLA:CPU finds the participants of a collective by that id, and its concurrent scheduler may start two
    independent gathers at once. They then exchange each other's data, or corrupt the heap (seen on jax 0.11.2, docs/log.md).

    The TPU compiler moves reductions out of loops that only add them up. That is what stages 2 and 3 must not have, since
    gradients would be whole in the loop, and where a cast stands between reduction and sum it ends in an internal error
    (`while_loop_all_reduce_code_motion.cc: user->opcode() == HloOpcode::kAdd`, libtpu 0.0.51).
    """
    platform = mesh.devices.flat[0].platform
    if mesh.size > 1 and platform == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if mesh.size > 1 and platform == "tpu":
        return {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}
    return {}
