"""Our models in the three parts of a `jzero.Pipeline`."""

from collections.abc import Callable
from typing import Any

import jax

from jzero._errors import explain
from jzero.models.build import Model
from jzero.models.config import MixtralConfig
from jzero.pipeline.model import Pipeline

LOOKED_UP = ("wte", "wpe")  # what the embedding reads; the head reads the rest, and without an `lm_head` the table too


def pipeline(model: Model) -> tuple[Pipeline, Callable[[Any], Any]]:
    """The model's loss as a pipeline, and a function from the model's parameters (stacked layers) to the pipeline's.

    Example:
        >>> import jax, jzero
        >>> from jzero import models
        >>> parts, arrange = pipeline(models.build("gpt2-tiny", num_layers=2))
        >>> sorted(arrange(models.build("gpt2-tiny", num_layers=2).init(jax.random.key(0))))
        ['embed', 'head', 'layers', 'tied']
    """
    if isinstance(model.config, MixtralConfig):
        found, fix = [f"{model.config.num_experts} experts"], "Use `expert`, `tensor` and `data` for it."
        problem = "a mixture of experts is no pipeline in this version"
        raise NotImplementedError(explain("jzero.models", problem, found=found, fix=fix))
    shapes = {name: part for name, part in jax.eval_shape(model.init, jax.random.key(0)).items() if name != "layers"}
    tied = () if "lm_head" in shapes else ("wte",)

    def arrange(params: Any) -> dict[str, Any]:
        embed = {name: params[name] for name in shapes if name in LOOKED_UP and name not in tied}
        head = {name: params[name] for name in shapes if name not in LOOKED_UP}
        both = {"tied": {name: params[name] for name in tied}} if tied else {}
        return {"embed": embed, "layers": params["layers"], "head": head, **both}

    def full(params: Any) -> Any:
        """With the shapes of what the other end reads, which nothing can compute with: the model merges all modules at once."""
        return {**shapes, **params}

    parts = Pipeline(
        embed=lambda params, tokens: model.embed(full(params), tokens[:, :-1]),
        layers=lambda params, x: model.layer(x, params),
        head=lambda params, x, tokens: model.end(full(params), x, tokens),
    )
    return parts, arrange
