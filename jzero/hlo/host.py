"""What a program exchanges with the host while it runs: callbacks, feeds, and arrays moved between memories."""

from typing import NamedTuple

from jzero.hlo.layout import HOST, stored
from jzero.hlo.text import Instruction, Module, attribute

_FEEDS = {"infeed", "outfeed"}
_CHANNELS = {"send", "recv"}


class Transfer(NamedTuple):
    """One instruction that waits for the host or moves an array to or from its memory."""

    what: str  # "callback", "infeed", "outfeed", "send", "recv" or "copy"
    bytes: int
    op_name: str
    source: str


def host_transfers(module: Module) -> tuple[Transfer, ...]:
    """Every exchange with the host, one entry per instruction, in the order of the text."""
    found = []
    for computation in module.computations.values():
        for one in computation.instructions.values():
            what = _what(one)
            if what:
                found.append(Transfer(what, one.shape.bytes, one.op_name, module.source(one)))
    return tuple(found)


def _what(one: Instruction) -> str:
    if one.opcode in _FEEDS:
        return one.opcode
    if one.opcode in _CHANNELS and attribute(one, "is_host_transfer") == "true":
        return one.opcode
    if one.opcode == "custom-call" and "callback" in (attribute(one, "custom_call_target") or ""):
        return "callback"
    if one.opcode in ("copy-start", "copy") and len({piece.space == HOST for piece in stored(one.type_text)}) > 1:
        return "copy"
    return ""
