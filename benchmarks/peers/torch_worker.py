"""One process of FSDP2 or DeepSpeed ZeRO-3 training the GPT-2 that `cpu_peers.py` wrote down. Started by torchrun.

`torch_worker.py fsdp2|deepspeed FOLDER OUT.json`: FOLDER has `spec.json`, `weights.npz` and `batches.npy`. Nothing of jzero is
imported: each side runs as its own users run it.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class Layer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(dim, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(spec["vocab_size"], spec["dim"]), nn.Embedding(spec["max_seq"], spec["dim"])
        self.layers = nn.ModuleList(Layer(spec["dim"], spec["num_heads"]) for _ in range(spec["num_layers"]))
        self.ln_f = nn.LayerNorm(spec["dim"])
        self.head = nn.Linear(spec["dim"], spec["vocab_size"], bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), targets.flatten())


def load(model, weights):
    state = {name: torch.from_numpy(array) for name, array in np.load(weights).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["head.weight"]), missing
    assert not unexpected, unexpected


def adamw(model, spec):
    options = {"lr": spec["learning_rate"], "weight_decay": spec["weight_decay"], "eps": 1e-8}
    return torch.optim.AdamW(model.parameters(), **options, fused=True)  # the fastest of torch's three on CPU


def fsdp2(model, spec):
    """A `step(tokens) -> loss` with every layer sharded on its own, the rest with the root, as torchtitan does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model, spec)

    def step(tokens):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def deepspeed_stage_3(model, spec):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": spec["batch"] // dist.get_world_size(),
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at 1.0 unless told not to
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, spec), config=config)

    def step(tokens):
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def main(kind, folder, out):
    folder, spec = Path(folder), json.loads((Path(folder) / "spec.json").read_text())
    torch.set_num_threads(spec["num_threads"])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = GPT2(spec)
    load(model, folder / "weights.npz")
    step = {"fsdp2": fsdp2, "deepspeed": deepspeed_stage_3}[kind](model, spec)
    losses, seconds, cpu_seconds = [], [], []
    for tokens in torch.from_numpy(np.load(folder / "batches.npy")).long():
        own = tokens.chunk(size)[rank]
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        loss = step(own)
        seconds.append(time.perf_counter() - start)
        spent = torch.tensor([time.process_time() - cpu, float(loss)])
        dist.all_reduce(spent)
        cpu_seconds.append(float(spent[0]))
        losses.append(float(spent[1]) / size)
    if rank == 0:
        Path(out).write_text(json.dumps({"losses": losses, "seconds": seconds, "cpu_seconds": cpu_seconds}))
    dist.barrier()
    # gloo's threads may still run when the interpreter tears down, and C++ then aborts ("terminate called without an active
    # exception"): leave without tearing down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
