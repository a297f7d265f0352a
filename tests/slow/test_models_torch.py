"""Logits against transformers' torch models with the same random weights.

torch need not live in this interpreter: set JZERO_PEER_PYTHON to one that has torch and transformers (the `peers` extra),
such as the environment that `benchmarks/cpu_peers.py` makes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jzero import models

SCRIPT = Path(__file__).parent / "torch_logits.py"
# Both sides compute in float32; logits of these models have a standard deviation near 0.3.
ATOL = 2e-5


def torch_python() -> str:
    if "JZERO_PEER_PYTHON" in os.environ:
        return os.environ["JZERO_PEER_PYTHON"]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        return sys.executable
    pytest.skip("needs torch and transformers: set JZERO_PEER_PYTHON to a Python that has them (extra `peers`)")


def gpt2_config(config):
    return {
        "vocab_size": config.vocab_size, "n_positions": config.max_seq, "n_embd": config.dim,
        "n_layer": config.num_layers, "n_head": config.num_heads,
    }  # fmt: skip


def gpt2_weights(params):
    """Published names; Conv1D keeps kernels as [in, out], as jzero does."""
    names = {
        "ln_1": "ln_1",
        "qkv": "attn.c_attn",
        "proj": "attn.c_proj",
        "ln_2": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    tops = {"wte.weight": params["wte"]["embedding"], "wpe.weight": params["wpe"]["embedding"]}
    tops |= {"ln_f.weight": params["ln_f"]["scale"], "ln_f.bias": params["ln_f"]["bias"]}
    for index, layer in enumerate(models.unstack(params["layers"])):
        for ours, theirs in names.items():
            for leaf, array in layer[ours].items():
                tops[f"h.{index}.{theirs}.{'bias' if leaf == 'bias' else 'weight'}"] = array
    return {f"transformer.{name}": array for name, array in tops.items()}


def llama_config(config):
    fields = {
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_seq, "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor, "original_max_position_embeddings": scaling.original_seq,
        }  # fmt: skip
    # transformers 4 spells it in two fields, 5 in one.
    return {**fields, "rope_theta": config.rope_theta, "rope_scaling": rope, "rope_parameters": rope}


def llama_weights(params):
    """Published names; torch's Linear keeps kernels as [out, in]."""
    attn, mlp = "self_attn.{}_proj", "mlp.{}_proj"
    names = {name: attn.format(name) for name in "qkvo"} | {name: mlp.format(name) for name in ("gate", "up", "down")}
    names |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    tops = {"model.embed_tokens.weight": params["wte"]["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if "lm_head" in params:
        tops["lm_head.weight"] = params["lm_head"]["embedding"]
    for index, layer in enumerate(models.unstack(params["layers"])):
        for ours, theirs in names.items():
            (array,) = layer[ours].values()
            tops[f"model.layers.{index}.{theirs}.weight"] = array.T if array.ndim == 2 else array
    return tops


SMALL = {"num_layers": 3, "max_seq": 64, "vocab_size": 199}
CASES = {
    "gpt2": ("gpt2", models.preset("gpt2-tiny", **SMALL)),
    "llama, untied": ("llama", models.preset("llama-tiny", **SMALL)),
    "llama, tied, stretched": (
        "llama",
        # original_seq is short, so that some frequencies are kept, some stretched and some blended.
        models.preset("llama-tiny", **SMALL, tied=True, rope_scaling=models.RopeScaling(factor=8.0, original_seq=256)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    python = torch_python()
    family, config = CASES[case]
    model = models.build(config)
    # Larger than at initialisation, and no bias or norm left at zero or one: every weight must matter.
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), model.init(jax.random.key(0))
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 48), 0, config.vocab_size)
    to_torch = {"gpt2": (gpt2_config, gpt2_weights), "llama": (llama_config, llama_weights)}[family]
    spec = {"family": family, "config": to_torch[0](config), "tokens": np.asarray(tokens).tolist()}
    files = [str(tmp_path / name) for name in ("spec.json", "weights.npz", "logits.npy")]
    Path(files[0]).write_text(json.dumps(spec))
    np.savez(files[1], **{name: np.ascontiguousarray(array) for name, array in to_torch[1](params).items()})
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA"))}
    done = subprocess.run([python, str(SCRIPT), *files], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    expected = np.load(files[2])
    assert expected.std() > 0.1
    np.testing.assert_allclose(model.apply(params, tokens), expected, atol=ATOL * max(1, expected.std()))
