"""What compilers say a kernel takes: vector memory on TPUs, registers and spills on GPUs. No device is needed.

A TPU's compiler writes it into the program. Mosaic GPU's assembler says it on stdout, if `MOSAIC_GPU_DUMP_PTXAS` is set; once a
process for each kernel, which it keeps.
"""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_SAYS = "MOSAIC_GPU_DUMP_PTXAS"
_ON_TPU = re.compile(r'custom_call_target="tpu_custom_call".*?"used_scoped_memory_configs":\[(.*?)\]')
_VMEM = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')
_ON_GPU = re.compile(
    r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s*ptxas info\s*: Used (\d+) registers"
)


class Use(NamedTuple):
    """Of one kernel; what its compiler does not have is None."""

    vmem_bytes: int | None = None
    registers: int | None = None  # of each thread; 255 is the most
    spill_bytes: int | None = None  # stored to and loaded from memory for want of registers, per thread


class Said:
    """What was written to stdout, once the context is left."""

    text = ""


@contextmanager
def listening() -> Iterator[Said]:
    """While programs are compiled: the assembler's words are kept, and anything else goes to stdout afterwards."""
    said, before = Said(), os.environ.get(_SAYS)
    _flush()
    own = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.environ[_SAYS] = "1"
        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            _flush()
            os.dup2(own, 1)
            os.close(own)
            os.environ.pop(_SAYS)
            if before is not None:
                os.environ[_SAYS] = before
            file.seek(0)
            said.text = file.read().decode(errors="replace")
            others = [line for line in said.text.splitlines() if "ptxas" not in line and "spill" not in line]
            print(*others, sep="\n", end="\n" if others else "", flush=True)


def _flush() -> None:
    """Python's and C's buffers of stdout."""
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)


def uses(compiled: Any, said: Said) -> list[Use]:
    """Of the kernels in a program; on a GPU of those that were compiled just now."""
    found = [Use(vmem_bytes=sum(map(int, _VMEM.findall(used)))) for used in _ON_TPU.findall(compiled.as_text())]
    return found + [
        Use(registers=int(registers), spill_bytes=int(stores) + int(loads))
        for stores, loads, registers in _ON_GPU.findall(said.text)
    ]
