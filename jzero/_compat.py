"""Every use of a JAX internal that moves between versions, behind names of our own.

Met so far: `scan`'s `num_consts`/`num_carry` became `ft_in`; `ClosedJaxpr` became a `Jaxpr` with constants inside;
`get_bind_params` gives `(subfuns, params)` or `params`; `compute_on`, which is experimental, takes `out_memory_spaces`. Nothing
else in jzero imports `jax._src`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import jax
from jax._src import compute_on, core, pjit, source_info_util
from jax._src import mesh as mesh_lib
from jax._src.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from jzero._types import SHOWN_AXES

Literal = core.Literal


class ScanParts(NamedTuple):
    """What a `scan` equation runs, independent of how its parameters are spelled."""

    num_consts: int
    num_carry: int
    body: Any
    length: int
    reverse: bool
    unroll: int | bool


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr whose `invars` are the arguments, and the constants bound to its `constvars`."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Every program inside an equation, whatever the equation is."""
    found = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple | list) else (value,))]
    return [item for item in found if hasattr(item, "eqns") or hasattr(item, "jaxpr")]


def scan_parts(eqn: Any) -> ScanParts:
    params = eqn.params
    if "ft_in" in params:
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    return ScanParts(num_consts, num_carry, params["jaxpr"], params["length"], params["reverse"], params["unroll"])


def bind(eqn: Any, args: Sequence[Any], **changed: Any) -> list[Any]:
    """Run one equation on new arguments, with some parameters changed, keeping its source line and name stack."""
    bound = eqn.primitive.get_bind_params({**eqn.params, **changed})
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = eqn.primitive.bind(*subfuns, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def provenance(eqn: Any) -> ExitStack:
    """A context in which what is traced carries the equation's user source line, so errors and HLO still name it."""
    stack = ExitStack()
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    stack.enter_context(source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack))
    stack.enter_context(eqn.ctx.manager)
    return stack


def where(eqn: Any) -> str:
    """`model.py:41 (attention)`: the user's line that made the equation."""
    return source_info_util.summarize(eqn.source_info)


def is_backward(eqn: Any) -> bool:
    """Whether differentiation made the equation for the backward pass, as its name stack says."""
    return "transpose(" in str(eqn.source_info.name_stack)


def rebind_remat(eqn: Any, fn: Callable[..., list[Any]], args: Sequence[Any]) -> list[Any]:
    """A `checkpoint` equation again, `fn` (of pytrees) its body; keeps `differentiated`, which alone makes its barrier real."""
    traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr, consts = open_jaxpr(traced)
    body = partial_eval.convert_constvars_jaxpr(jaxpr) if consts else jaxpr
    prevent_cse = eqn.params["prevent_cse"]
    keep = prevent_cse if isinstance(prevent_cse, bool) else any(prevent_cse)
    out = eqn.primitive.bind(*consts, *jax.tree.leaves(args), **{**eqn.params, "jaxpr": body, "prevent_cse": keep})
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def primitive(name: str, fn: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
    """An operation that programs show as one equation called `name`, and whose meaning is `fn(*arrays, **params)`.

    Passes that read programs can then know it by name. Derivatives, batching and lowering are those of `fn`.
    """
    made = core.Primitive(name)
    made.multiple_results = True

    def shapes(*avals: Any, **params: Any) -> list[Any]:
        structs = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
        place = lambda out: core.get_cur_mesh_sharding(PartitionSpec(*(None,) * out.ndim))
        return [
            core.ShapedArray(out.shape, out.dtype, sharding=place(out))
            for out in jax.eval_shape(partial(fn, **params), *structs)
        ]

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
        moving = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

        def of_moving(*values: Any) -> Sequence[Any]:
            full = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
            return fn(*full.values(), **params)

        out, moved = jax.jvp(of_moving, [primals[index] for index in moving], [tangents[index] for index in moving])
        still = lambda value, tangent: (
            ad.Zero(core.typeof(value).to_tangent_aval()) if tangent.dtype == jax.dtypes.float0 else tangent
        )
        return list(out), [still(*pair) for pair in zip(out, moved, strict=True)]

    def batched(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
        out = jax.vmap(partial(fn, **params), in_axes=tuple(dims))(*args)
        return list(out), [0] * len(out)

    made.def_abstract_eval(shapes)
    jitted = cache(lambda params: jax.jit(partial(fn, **dict(params))))
    made.def_impl(lambda *args, **params: jitted(tuple(params.items()))(*args))
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = batched
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=True))
    return made.bind


def ordered_effects(jaxpr: Any) -> list[str]:
    """The ordered effects of a program, which JAX cannot run on several devices."""
    from jax._src import effects

    return [str(effect) for effect in jaxpr.effects if effects.ordered_effects.contains(effect)]


def prune(jaxpr: Any, outputs: Sequence[bool]) -> tuple[Any, list[bool]]:
    """The part of a jaxpr that the chosen outputs need, and which of its inputs that part still takes."""
    opened, consts = open_jaxpr(jaxpr)
    body = partial_eval.convert_constvars_jaxpr(opened) if consts else opened
    pruned, used = partial_eval.dce_jaxpr(body, list(outputs))
    return pruned, list(used)


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Run a jaxpr as it is."""
    opened, consts = open_jaxpr(jaxpr)
    return core.eval_jaxpr(opened, consts, *args)


def on_host(fn: Callable[..., list[Any]], args: Sequence[Any], spaces: Sequence[Any]) -> list[Any]:
    """Inside a program: `fn(*args)` by the host's processors, on what lies in host memory or is copied there first.

    Args:
      args: pytrees of arrays.
      spaces: for each output the memory that it is wanted in. Told here it is copied once: the TPU compiler copies what it
        hears of later to the host and back.
    """
    there = jax.tree.map(lambda one: jax.device_put(one, jax.memory.Space.Host), tuple(args))
    # Traced as if all of it were on the device: types name a memory, and constants that are made inside would be in another.
    avals = [core.typeof(one).update(memory_space=jax.memory.Space.Device) for one in jax.tree.leaves(there)]
    flat = lambda *leaves: fn(*jax.tree.unflatten(jax.tree.structure(there), leaves))
    with compute_on.extend_compute_type("device_host"):
        traced = jax.make_jaxpr(flat)(*avals)
    return compute_on.compute_on_p.bind(
        *jax.tree.leaves(there), jaxpr=traced, compute_type="device_host", out_memory_spaces=tuple(spaces),
        compiler_options_json=None,
    )  # fmt: skip


_before: ContextVar[Any] = ContextVar("_before", default=None)


@contextmanager
def mesh_shown(mesh: Any) -> Iterator[None]:
    """While a program is traced under Auto axes: its code may ask for the mesh, as it may inside `shard_map`.

    Only for meshes with an axis that code has to know of (`SHOWN_AXES`): types of arrays then name the mesh.
    """
    if not any(mesh.shape.get(axis, 1) > 1 for axis in SHOWN_AXES):
        yield
        return
    token = _before.set(mesh_lib.get_abstract_mesh())
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _before.reset(token)


@contextmanager
def mesh_hidden() -> Iterator[None]:
    """Inside `mesh_shown`: without it, as for an analysis of what the program means."""
    before = _before.get()
    if before is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(before):
        yield


def without_mesh() -> Any:
    """While something is traced that will run on pieces: types under the mesh outside do not fit inside `shard_map`."""
    return jax.sharding.use_abstract_mesh(mesh_lib.empty_abstract_mesh)


@contextmanager
def constraints_apart_from(axes: Sequence[str]) -> Iterator[None]:
    """While a program is traced with `axes` manual: what the user's sharding constraints say of them is dropped.

    Every value there is one shard's, so such a constraint says nothing, and JAX refuses it. It refuses a constraint that names
    a concrete mesh in a loop too, whose types name the mesh in force, partly manual: so what is left of one names that mesh.
    """
    thread, real = threading.get_ident(), pjit._create_sharding_for_array

    def allowed(mesh: Any, sharding: Any, name: str, api_name: str) -> Any:
        found = real(mesh, sharding, name, api_name)
        here = mesh_lib.get_abstract_mesh()
        ours = threading.get_ident() == thread and set(axes) & set(here.manual_axes)
        if not ours or api_name != "with_sharding_constraint" or not isinstance(found, NamedSharding):
            return found
        return NamedSharding(
            here, PartitionSpec(*(_apart_from(axes, entry) for entry in found.spec)), memory_kind=found.memory_kind
        )

    pjit._create_sharding_for_array = allowed  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        pjit._create_sharding_for_array = real


def _apart_from(axes: Sequence[str], entry: Any) -> Any:
    """An entry of a spec without `axes`."""
    if isinstance(entry, tuple):
        return tuple(name for name in entry if name not in axes) or None
    return None if entry in axes else entry


def tell(key: str, value: str) -> None:
    """Put a value into the key-value store of `jax.distributed`'s coordinator."""
    _client().key_value_set(key, value)


def hear(key: str, timeout_seconds: float) -> str | None:
    """A value of that store, waited for; None if nobody put it there in time."""
    try:
        return _client().blocking_key_value_get(key, int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _client() -> Any:
    from jax._src import distributed

    assert distributed.global_state.client is not None, "several processes without jax.distributed"
    return distributed.global_state.client


def inlined(jaxpr: Any) -> Any:
    """The same program with calls of `jit` written out."""
    opened, consts = open_jaxpr(jaxpr)
    avals = [var.aval for var in opened.invars]
    return jax.make_jaxpr(lambda *args: _evaluate_inlined(opened, consts, args))(*avals)


def _evaluate_inlined(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in ("jit", "pjit", "closed_call"):
            inner, inner_consts = open_jaxpr(eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"])
            outputs = _evaluate_inlined(inner, inner_consts, inputs)
        else:
            with provenance(eqn):
                outputs = bind(eqn, inputs)
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def cut(jaxpr: Any, values: Sequence[Any], *, given: bool) -> Any:
    """A program without constants, changed at some of its values: they are further inputs (`given`), or further outputs."""
    opened, consts = open_jaxpr(jaxpr)
    assert not consts
    chosen = set(values) if given else set()
    kept = [eqn for eqn in opened.eqns if not chosen & set(eqn.outvars)]
    ins, outs = [*opened.invars, *(values if given else ())], [*opened.outvars, *(() if given else values)]
    return core.Jaxpr((), ins, outs, kept, opened.effects, opened.debug_info.with_unknown_names())


def without_effects(jaxpr: Any) -> Any:
    """A program without constants that prints and calls nothing: what such an equation computes is not defined in it."""
    opened, consts = open_jaxpr(jaxpr)
    assert not consts
    kept = [eqn for eqn in opened.eqns if not eqn.effects]
    return core.Jaxpr((), opened.invars, opened.outvars, kept, core.no_effects, opened.debug_info)


def without_constants(jaxpr: Any) -> tuple[Any, list[Any]]:
    """The program with its constants as leading inputs, and those constants."""
    opened, consts = open_jaxpr(jaxpr)
    return (partial_eval.convert_constvars_jaxpr(opened) if consts else opened), list(consts)
