"""What the parts of a `jzero.Pipeline` cost, for `partition.split`: parameters, the compiler's FLOPs, or seconds."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax

from jzero._errors import explain, suggest
from jzero._tree import abstract, num_elements
from jzero.pipeline.model import Pipeline, is_list, num_layers, seen_by
from jzero.pipeline.partition import Costs

By = Literal["parameters", "flops", "seconds"]
WHO = "jzero.pipeline.costs"
NUM_TIMED = 3  # runs after the first; the fastest counts


def of(model: Pipeline, params: Any, *batch: Any, by: By = "flops") -> Costs:
    """The cost of every layer, of the embedding and of the head, on one microbatch.

    Args:
      params, batch: arrays or `ShapeDtypeStruct`s; of one microbatch of one device. "seconds" needs arrays.
      by: "parameters" counts them (tied ones in both ends); "flops" asks the compiler of the default back end about the forward
        pass, of which forward and backward together take three; "seconds" runs forward and backward on the default device.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Pipeline(lambda p, x: x @ p, lambda p, x: x @ p, lambda p, y, x: jnp.mean(y @ p))
      >>> params = {"embed": jnp.ones((8, 8)), "layers": jnp.ones((4, 8, 8)), "head": jnp.ones((8, 64))}
      >>> of(model, params, jnp.ones((2, 8)), by="parameters")
      Costs(layers=(64.0, 64.0, 64.0, 64.0), embed=64.0, head=512.0)
    """
    known: dict[str, Callable[..., float]] = {"parameters": _parameters, "flops": _flops, "seconds": _seconds}
    if by not in known:
        fix = suggest(by, known)
        raise ValueError(explain(WHO, "a model is measured in something", found=[f"by={by!r}"], fix=fix))
    measure = known[by]
    x = jax.eval_shape(model.start, abstract(params), *abstract(batch))
    x = x if by != "seconds" else jax.jit(model.start)(params, *batch)
    embed = measure(model.embed, seen_by("embed", params), *batch)
    head = measure(lambda p, x, *batch: jax.tree.leaves(model.head(p, x, *batch))[0], seen_by("head", params), x, *batch)
    return Costs(_layers(model, params, x, measure), embed, head)


def _layers(model: Pipeline, params: Any, x: Any, measure: Callable[..., float]) -> tuple[float, ...]:
    layers, count = params["layers"], num_layers(params)
    if is_list(layers):
        return tuple(measure(fn, own, x) for fn, own in zip(model.functions(count), layers, strict=True))
    take = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    first = take(layers) if measure is _seconds else jax.eval_shape(take, abstract(layers))
    return (measure(model.functions(1)[0], first, x),) * count


def _parameters(fn: Callable[..., Any], params: Any, *args: Any) -> float:
    return float(sum(num_elements(leaf) for leaf in jax.tree.leaves(params)))


def _flops(fn: Callable[..., Any], params: Any, *args: Any) -> float:
    analysis = jax.jit(fn).lower(*abstract((params, *args))).cost_analysis()
    return max(float((analysis or {}).get("flops", 0.0)), 0.0)


def _seconds(fn: Callable[..., Any], params: Any, *args: Any) -> float:
    """Forward and backward, with respect to parameters."""

    def both(params: Any, *args: Any) -> Any:
        out, backward = jax.vjp(partial(_of_params, fn, args), params)
        return backward(out)

    run = jax.jit(both)
    jax.block_until_ready(run(params, *args))
    times = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        jax.block_until_ready(run(params, *args))
        times.append(time.perf_counter() - start)
    return min(times)


def _of_params(fn: Callable[..., Any], args: tuple[Any, ...], params: Any) -> Any:
    return fn(params, *args)
