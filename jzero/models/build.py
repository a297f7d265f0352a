"""A model as a value: pure functions over a plain dict of parameters, with flax nnx modules inside."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jzero._errors import explain
from jzero._tree import num_elements
from jzero.attention import Attention, Kind, check_kind
from jzero.attention import attention as attention_by
from jzero.models.config import GPT2Config, LlamaConfig, MixtralConfig, ModelConfig, preset
from jzero.models.gpt2 import GPT2Layer, GPT2Outer
from jzero.models.layers import run_layers
from jzero.models.llama import LlamaLayer, LlamaOuter
from jzero.models.loss import next_token_loss, next_token_loss_without_logits
from jzero.models.mixtral import MixtralLayer, MixtralOuter, check, routing_loss

_MODULES: dict[type, tuple[Any, Any]] = {
    GPT2Config: (GPT2Layer, GPT2Outer), LlamaConfig: (LlamaLayer, LlamaOuter), MixtralConfig: (MixtralLayer, MixtralOuter),
}  # fmt: skip

FLOPS_FORMULA = (
    "6 N + 12 L d T per token; N = parameters that multiply (no position table, an untied embedding not, of experts those of "
    "one token), d = heads x head dim"
)


class Model(NamedTuple):
    """`init`, `apply` and `loss` are pure; `params["layers"]` is stacked on dim 0 (scanned) or a list (unrolled)."""

    config: ModelConfig
    init: Callable[[jax.Array], dict[str, Any]]  # key -> params, float32
    apply: Callable[[Any, jax.Array], jax.Array]  # params, tokens[B, T] -> logits[B, T, V]
    loss: Callable[[Any, jax.Array], jax.Array]  # params, tokens[B, T + 1] -> scalar: mean over B and T, float32
    num_params: int  # as published: padding of the vocabulary not counted
    flops_per_token: Callable[[int], float]  # sequence length -> forward and backward, causality not discounted
    embed: Callable[[Any, jax.Array], Any]  # params, tokens -> x; of Mixtral with the router's losses beside it
    layer: Callable[[Any, Any], Any]  # x, one layer's params -> x
    head: Callable[[Any, Any], jax.Array]  # params, x -> logits, padding included
    end: Callable[[Any, Any, jax.Array], jax.Array]  # params, what the layers gave, tokens[B, T + 1] -> the loss


def build(
    model: str | ModelConfig,
    *,
    scan_layers: bool = True,
    attention: Attention | None = None,
    attention_kind: Kind = "ulysses",
    loss: str = "plain",
    **changes: Any,
) -> Model:
    """A GPT-2, Llama or Mixtral as pure functions.

    Args:
        model: a preset's name or a config. Keyword `changes` replace fields of a preset.
        scan_layers: stack the layers and scan over them (compile time does not grow with depth), or unroll a list.
        attention: None chooses by device, shape and dtype; "cudnn", "splash", "plain" or "chunked" insists
            (`pallas_kernels.attention`).
        attention_kind: "ulysses" or "ring", on a mesh with an axis `sequence` (`jzero.attention`).
        loss: "plain", or the head of `pallas_kernels`: "fused" and "chunked" keep no logits for the backward pass, "reference"
            does, "auto" chooses (`jzero.models.loss`). Plans count the plain one.

    Compute follows the dtype of the parameters: cast them to bfloat16 and activations are bfloat16, with norms,
    softmax and loss in float32.

    Example:
        >>> import jax
        >>> model = build("gpt2-tiny", num_layers=2)
        >>> params = model.init(jax.random.key(0))
        >>> model.loss(params, jax.numpy.zeros((1, 9), int)).shape
        ()
    """
    config = preset(model, **changes) if isinstance(model, str) else model
    if isinstance(config, MixtralConfig):
        check(config)
    check_kind(attention_kind)
    layer_class, outer_class = _MODULES[type(config)]
    attend = partial(attention_by, kind=attention_kind, implementation=attention)

    def make_layer(key: jax.Array) -> nnx.Module:
        return layer_class(config, attend=attend, rngs=nnx.Rngs(key))

    def make_outer(key: jax.Array) -> nnx.Module:
        return outer_class(config, rngs=nnx.Rngs(key))

    layer_def, outer_def = (nnx.graphdef(nnx.eval_shape(make, jax.random.key(0))) for make in (make_layer, make_outer))

    def init(key: jax.Array) -> dict[str, Any]:
        outer_key, layers_key = jax.random.split(key)
        keys = jax.random.split(layers_key, config.num_layers)
        layers = jax.vmap(lambda one: _params(make_layer(one)))(keys)
        return {**_params(make_outer(outer_key)), "layers": layers if scan_layers else unstack(layers)}

    def outer(params: Any) -> Any:
        return nnx.merge(outer_def, {name: part for name, part in params.items() if name != "layers"})

    def embed(params: Any, tokens: jax.Array) -> Any:
        _check_length(tokens, config)
        return outer(params).embed(tokens)

    def layer(x: Any, params: Any) -> Any:
        return nnx.merge(layer_def, params)(x)

    def head(params: Any, x: Any) -> jax.Array:
        return outer(params).head(x)

    def padded_logits(params: Any, tokens: jax.Array) -> jax.Array:
        return head(params, run_layers(layer, embed(params, tokens), params["layers"]))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return padded_logits(params, tokens)[..., : config.vocab_size]

    def mean_loss(params: Any, tokens: jax.Array) -> jax.Array:
        return end(params, run_layers(layer, embed(params, tokens[:, :-1]), params["layers"]), tokens)

    def end(params: Any, x: Any, tokens: jax.Array) -> jax.Array:
        tokens_loss = mean_token_loss(params, x, tokens)
        return tokens_loss + routing_loss(config, x) if isinstance(config, MixtralConfig) else tokens_loss

    def mean_token_loss(params: Any, x: Any, tokens: jax.Array) -> jax.Array:
        if loss == "plain":
            return next_token_loss(head(params, x), tokens[:, 1:], vocab_size=config.vocab_size)
        x, w, vocab_dim = outer(params).before_logits(x)
        chosen = None if loss == "auto" else loss
        return next_token_loss_without_logits(
            x, w, tokens[:, 1:], vocab_dim=vocab_dim, vocab_size=config.vocab_size, implementation=chosen
        )

    num_params = count_params(jax.eval_shape(init, jax.random.key(0))) - _num_padding(config)
    return Model(config, init, apply, mean_loss, num_params, _flops_per_token(config, num_params), embed, layer, head, end)


def count_params(params: Any) -> int:
    return sum(num_elements(leaf) for leaf in jax.tree.leaves(params))


def unstack(layers: Any) -> list[Any]:
    """Stacked layer parameters as a list with one entry per layer."""
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(num_layers)]


def stack(layers: list[Any]) -> Any:
    """The reverse of `unstack`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def _params(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def _num_padding(config: ModelConfig) -> int:
    tables = 1 if isinstance(config, GPT2Config) or config.tied else 2
    return tables * config.dim * ((config.padded_vocab_size or config.vocab_size) - config.vocab_size)


def _flops_per_token(config: ModelConfig, num_params: int) -> Callable[[int], float]:
    """PaLM's count (Chowdhery et al., 2022, appendix B): 6 per parameter that multiplies, 12 L H C T for attention."""
    unused = config.max_seq * config.dim if isinstance(config, GPT2Config) else 0
    if isinstance(config, LlamaConfig) and not config.tied:
        unused = config.vocab_size * config.dim
    if isinstance(config, MixtralConfig):
        unused += (config.num_experts - config.top_k) * config.num_layers * 3 * config.dim * config.ffn_dim
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    return lambda seq: 6.0 * (num_params - unused) + attention * seq


def _check_length(tokens: jax.Array, config: ModelConfig) -> None:
    if tokens.shape[1] > config.max_seq:
        raise ValueError(
            explain(
                "jzero.models",
                f"sequences may have at most {config.max_seq} tokens",
                found=[f"tokens{list(tokens.shape)}: {tokens.shape[1]} tokens per sequence"],
                context=f"{type(config).__name__} with max_seq={config.max_seq}",
                fix=f"Shorten the sequences, or build the model with max_seq={tokens.shape[1]}.",
            )
        )
