"""Laws compile hundreds of tiny programs: LLVM's optimizer is left out, which halves that time and changes no HLO."""

import jax

QUICK = {"xla_backend_optimization_level": "0"}


def quick_jit(fn):
    return jax.jit(fn, compiler_options=QUICK)
