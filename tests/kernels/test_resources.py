"""What kernels take, as compilers say it: read from their words, and from real programs."""

import os

import jax.numpy as jnp
import pytest
import test_compile
from fixtures.compilers import compilers as compilers

from pallas_kernels import norm
from pallas_kernels.bench.resources import Use, listening, uses

SPILLED = """ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    48 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
"""


class Program:
    def __init__(self, text=""):
        self.as_text = lambda: text


def test_a_spill_is_read_and_other_words_pass(capfd):
    with listening() as said:
        assert os.environ["MOSAIC_GPU_DUMP_PTXAS"] == "1"
        os.write(1, SPILLED.encode())
        print("something else")
    assert uses(Program(), said) == [Use(registers=255, spill_bytes=48)]
    assert capfd.readouterr().out == "something else\n"
    assert "MOSAIC_GPU_DUMP_PTXAS" not in os.environ


def test_words_pass_although_compiling_fails(capfd):
    def refuse():
        with listening():
            os.write(1, b"the reason\n")
            raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        refuse()
    assert capfd.readouterr().out == "the reason\n"


@pytest.mark.compile
@pytest.mark.parametrize("target", ["v5e:2x2", "h100:1x1"])
def test_a_real_kernel_says_what_it_takes(target):
    rows = ((1024, 640), jnp.float32)  # of no other test: a process compiles each kernel once
    run = lambda x, scale: norm.rms_norm(x, scale, eps=1e-3, implementation=test_compile.TARGETS[target])
    found = []
    test_compile.compile_for(target, run, rows, ((640,), jnp.float32), told=found)
    (use,) = found
    if target.startswith("h100"):
        assert 0 < use.registers <= 255
        assert use.spill_bytes == 0
    else:
        assert 640 * 4 < use.vmem_bytes < test_compile.VMEM_BYTES
