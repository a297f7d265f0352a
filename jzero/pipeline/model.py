"""`jzero.Pipeline`: a model in the three parts that a pipeline needs, and on one device an ordinary loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax

from jzero import remat
from jzero._errors import columns, explain
from jzero._tree import abstract, leaves_with_path, path_name, short

WHO = "jzero.Pipeline"
PARTS = ("embed", "layers", "head")


class Pipeline:
    """A loss made of an embedding, a stack of layers and a head, so that layers can be spread over the mesh axis `pipe`.

    Called as `loss(params, *batch)` it is the sequential model: what `jzero.make_train_step` runs on one device, and what the
    pipeline must equal. `params` is `{"embed": ..., "layers": ..., "head": ...}` and optionally `"tied"`, a dict whose entries
    both embedding and head see among their own (a table used twice; its gradients are added up).

    Args:
      embed: `embed(params, *batch) -> x`, an array or a pytree of floating-point arrays.
      layers: `layers(params, x) -> x`, one layer, where `params["layers"]` is stacked on dim 0 (or a list of layers); or a list
        of different functions, one for each entry of the list `params["layers"]`. x keeps its shapes and dtypes.
      head: `head(params, x, *batch) -> loss`, or `jzero.weighted(sum, weight)`, or with `has_aux` a pair with aux.
      split: how many layers each virtual stage takes, from first to last (pipe stages times chunks numbers). Default: evenly;
        `jzero.pipeline.costs.of` and `partition.split` find the best by cost.

    Stacked layers rest on the devices of their pipe stage. Those of a list may differ in structure, so each device holds all
    of them (over `pipe`; ZeRO still shards over `data`).

    Example:
      >>> import jax, jax.numpy as jnp, optax, jzero
      >>> model = Pipeline(
      ...     embed=lambda p, x, y: x @ p,
      ...     layers=lambda p, x: x + jnp.tanh(x @ p),
      ...     head=lambda p, x, x0, y: jnp.mean((x @ p - y) ** 2),
      ... )
      >>> params = {"embed": jnp.eye(16), "layers": jnp.ones((8, 16, 16)) / 16, "head": jnp.ones((16, 4)) / 16}
      >>> train_step = jzero.make_train_step(model, optax.sgd(0.1), accumulate=4)
      >>> step = jzero.shard(train_step, stage=1, mesh=jzero.make_mesh(pipe=4, data=2), schedule="1f1b")
      >>> state = step.place(train_step.init(params))
      >>> state, metrics = step(state, jnp.ones((8, 16)), jnp.zeros((8, 4)))

    References:
      Huang et al., GPipe, 2019. Narayanan et al., Megatron-LM, 2021.
    """

    def __init__(
        self, embed: Callable[..., Any], layers: Callable[..., Any] | Sequence[Callable[..., Any]], head: Callable[..., Any], *,
        split: Sequence[int] | None = None,
    ):  # fmt: skip
        each = {f"layers[{i}]": layer for i, layer in enumerate(layers)} if is_list(layers) else {"layers": layers}
        functions = {"embed": embed, **each, "head": head}
        wrong = [f"{name}={value!r}" for name, value in functions.items() if not callable(value)]
        if wrong or not each:
            fix = "Write Pipeline(embed=embed_fn, layers=layer_fn, head=loss_fn)."
            raise TypeError(explain(WHO, "every part is a function", found=wrong or ["layers=[]"], fix=fix))
        self.embed, self.head = embed, head
        self.layers = tuple(layers) if isinstance(layers, Sequence) else layers
        self.split = None if split is None else tuple(split)

    def __call__(self, params: Any, *batch: Any) -> Any:
        x = self.run_layers(params["layers"], self.start(params, *batch))
        return self.head(seen_by("head", params), x, *batch)

    def start(self, params: Any, *batch: Any) -> Any:
        """What the first layer gets."""
        check_params(params)
        x = self.embed(seen_by("embed", params), *batch)
        _check_floats(x)
        return x

    def run_layers(self, layers: Any, x: Any) -> Any:
        """All layers one after the other, each under the remat policy of the step."""
        if is_list(layers):
            for index, (fn, params) in enumerate(zip(self.functions(len(layers)), layers, strict=True)):
                y = remat.wrap_layer(fn, scanned=False)(params, x)
                _check_fits(index, x, y)
                x = y
            return x
        layer = self.functions(1)[0]
        first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), layers)
        _check_fits(0, x, jax.eval_shape(layer, first, x))
        body = remat.wrap_layer(layer)
        return jax.lax.scan(lambda x, params: (body(params, x), None), x, layers)[0]

    def functions(self, num_layers: int) -> tuple[Callable[..., Any], ...]:
        """One function per layer of a list."""
        if not isinstance(self.layers, tuple):
            return (self.layers,) * num_layers
        if len(self.layers) != num_layers:
            found = [f"{len(self.layers)} functions, {num_layers} entries in params['layers']"]
            raise ValueError(
                explain(WHO, "every layer has a function and parameters", found=found, fix="Make them one to one.")
            )
        return self.layers


def is_list(layers: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(layers, list | tuple)


def seen_by(part: str, params: Mapping[str, Any]) -> Any:
    """What embedding or head get: their own parameters, with the tied ones among them."""
    own, tied = params[part], params.get("tied", {})
    return {**own, **tied} if tied else own


def num_layers(params: Mapping[str, Any]) -> int:
    """Layers of a list, or of a stack."""
    layers = params["layers"]
    return len(layers) if is_list(layers) else jax.tree.leaves(layers)[0].shape[0]


def check_params(params: Any) -> None:
    """Raise unless `params` has the three parts, layers stacked alike, and tied leaves that collide with nothing."""
    if not isinstance(params, Mapping) or not set(PARTS) <= set(params) or set(params) - {*PARTS, "tied"}:
        met = ", ".join(map(repr, params)) if isinstance(params, Mapping) else type(params).__name__
        fix = 'Write {"embed": ..., "layers": ..., "head": ...}, and "tied" for leaves that embed and head share.'
        raise ValueError(explain(WHO, "params have an embedding, layers and a head", found=[f"got {met}"], fix=fix))
    _check_tied(params)
    if not is_list(params["layers"]):
        _check_stacked(params["layers"])
    elif not params["layers"]:
        raise ValueError(explain(WHO, "a pipeline has layers", found=["params['layers'] is empty"], fix="Add one."))


def _check_tied(params: Mapping[str, Any]) -> None:
    tied = params.get("tied", {})
    if not tied:
        return
    parts = {name: params[name] for name in ("embed", "head")}
    found = [f"{name} is a {type(part).__name__}" for name, part in {**parts, "tied": tied}.items() if not _is_dict(part)]
    fix = "Make embed, head and tied dicts: embed and head see the entries of tied among their own."
    if found:
        raise TypeError(explain(WHO, "tied leaves are merged into dicts", found=found, fix=fix))
    twice = [f"{key!r} in {name} and in tied" for name, part in parts.items() for key in part if key in tied]
    if twice:
        raise ValueError(explain(WHO, "a tied leaf is named once", found=twice, fix="Remove it from embed and head."))


def _is_dict(part: Any) -> bool:
    return isinstance(part, Mapping)


def _check_stacked(layers: Any) -> None:
    leaves = [(path_name(path), leaf) for path, leaf in leaves_with_path(abstract(layers))]
    sizes = {leaf.shape[:1] for _, leaf in leaves}
    if not leaves or len(sizes) > 1 or () in sizes:
        rows = [[f"layers/{path}", short(leaf)] for path, leaf in leaves]
        fix = "Stack the layers' parameters: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers); or pass a list of them."
        raise ValueError(explain(WHO, "stacked layers agree on dim 0, the layer", found=columns(rows)[:20], fix=fix))


def _check_floats(x: Any) -> None:
    odd = [f"{path_name(path)}   {short(leaf)}".strip() for path, leaf in leaves_with_path(x) if not _is_floating(leaf)]
    if odd or not jax.tree.leaves(x):
        fix = "Send floating-point arrays; what a layer needs besides (positions, masks) it can make itself, or send as floats."
        raise TypeError(explain(WHO, "embed gives floating-point arrays", found=odd or ["nothing"], fix=fix))


def _is_floating(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)


def _check_fits(index: int, before: Any, after: Any) -> None:
    shapes = [[(path_name(path), short(leaf)) for path, leaf in leaves_with_path(tree)] for tree in (before, after)]
    if jax.tree.structure(before) == jax.tree.structure(after) and shapes[0] == shapes[1]:
        return
    named = [", ".join(f"{path} {leaf}".strip() for path, leaf in rows) for rows in shapes]
    found = [f"in:  {named[0]}", f"out: {named[1]}"]
    fix = "Give every layer's x the shape and dtype that embed gives it; cast at the end of the layer."
    raise TypeError(explain(WHO, f"layer {index}'s output does not fit the next one's input", found=found, fix=fix))
