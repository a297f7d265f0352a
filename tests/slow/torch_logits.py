"""Logits of transformers' torch models for weights made by jzero: run by `test_models_torch.py`, in torch's own Python.

`python torch_logits.py SPEC.json WEIGHTS.npz OUT.npy`: SPEC has `family`, the fields of transformers' config and `tokens`.
Needs torch and transformers, nothing of jzero: jax and torch seldom fit one interpreter.
"""

import json
import sys

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

MODELS = {"gpt2": (GPT2Config, GPT2LMHeadModel), "llama": (LlamaConfig, LlamaForCausalLM)}


def main(spec_file: str, weights_file: str, out_file: str) -> None:
    with open(spec_file) as file:
        spec = json.load(file)
    config_class, model_class = MODELS[spec["family"]]
    model = model_class(config_class(**spec["config"])).eval()
    weights = {name: torch.from_numpy(array) for name, array in np.load(weights_file).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # A tied head is the embedding under another name; anything else missing would leave random weights in place.
    missing = [name for name in missing if name != "lm_head.weight" or not model.config.tie_word_embeddings]
    assert not missing, missing
    assert not unexpected, unexpected
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor(spec["tokens"])).logits
    np.save(out_file, logits.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
