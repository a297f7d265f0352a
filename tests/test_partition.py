"""The partitioner against brute force, and against the two ways that it replaces."""

import itertools
import random

import jax
import jax.numpy as jnp
import pytest

import jzero
from jzero.pipeline import costs
from jzero.pipeline.partition import Costs, MemoryLimit, even, largest, split
from jzero.pipeline.schedules import gpipe, interleaved, one_f_one_b


def every_split(num_layers, num_stages):
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield tuple(end - first for first, end in itertools.pairwise((0, *cuts, num_layers)))


def random_costs(rng, num_layers):
    draw = lambda: rng.choice([rng.random(), rng.randint(0, 4), rng.randint(1, 100)])
    return Costs(tuple(float(draw()) for _ in range(num_layers)), float(draw()), float(draw()))


def needs(memory, counts):
    bounds = [0, *itertools.accumulate(counts)]
    return max(memory.of(first, end) for first, end in itertools.pairwise(bounds))


@pytest.mark.parametrize("num_layers", range(1, 13))
def test_equals_brute_force(num_layers):
    rng = random.Random(num_layers)
    for num_stages in range(1, min(num_layers, 8) + 1):
        for _ in range(5):
            drawn = random_costs(rng, num_layers)
            counts = split(drawn, num_stages)
            assert len(counts) == num_stages
            assert sum(counts) == num_layers
            assert min(counts) > 0
            assert largest(drawn, counts) == min(largest(drawn, other) for other in every_split(num_layers, num_stages))


@pytest.mark.parametrize("num_layers", range(2, 11))
def test_equals_brute_force_within_memory(num_layers):
    rng = random.Random(num_layers)
    for num_stages, make in itertools.product(range(1, min(num_layers, 6) + 1), (gpipe, one_f_one_b)):
        drawn, state, saved = (random_costs(rng, num_layers) for _ in range(3))
        memory = MemoryLimit(0, state, saved, make(num_stages, 6))
        sizes = sorted(needs(memory, counts) for counts in every_split(num_layers, num_stages))
        for limit in (sizes[0], sizes[len(sizes) // 2]):
            memory = memory._replace(limit_bytes=limit)
            fitting = [counts for counts in every_split(num_layers, num_stages) if needs(memory, counts) <= limit]
            counts = split(drawn, num_stages, memory=memory)
            assert needs(memory, counts) <= limit
            assert largest(drawn, counts) == min(largest(drawn, other) for other in fitting)
        with pytest.raises(ValueError, match="fits"):
            split(drawn, num_stages, memory=memory._replace(limit_bytes=sizes[0] * 0.999 - 1e-9))


def test_the_limit_knows_the_schedule():
    """What fits under 1F1B does not fit under GPipe, which holds every microbatch."""
    nothing, ones = Costs((0.0,) * 4), Costs((1.0,) * 4)
    memory = MemoryLimit(4, nothing, ones, one_f_one_b(2, 16))
    assert split(ones, 2, memory=memory) == (2, 2)
    with pytest.raises(ValueError, match="no split of 4 layers") as caught:
        split(ones, 2, memory=memory._replace(schedule=gpipe(2, 16)))
    assert all(part in str(caught.value) for part in ("32 bytes", "up to 16 inputs", "1f1b"))


def test_chunks_count_in_the_limit():
    ones = Costs((1.0,) * 4)
    memory = MemoryLimit(0, ones, Costs((0.0,) * 4), interleaved(2, 4, 2))
    assert memory.of(0, 1) == 2  # two chunks on the device, each like this one


@pytest.mark.parametrize(
    ("each", "num_stages", "part"),
    [
        (Costs((1.0,) * 6), 7, "6 layers for 7 stages"),
        (Costs((1.0,) * 6), 0, "of equal size with 1, 2, 3, 6"),
        (Costs((1.0, -1.0)), 1, "layer 1: -1.0"),
        (Costs((1.0, 1.0), head=float("nan")), 1, "head: nan"),
    ],
)
def test_bad_input(each, num_stages, part):
    with pytest.raises(ValueError, match=r"jzero\.pipeline\.partition") as caught:
        split(each, num_stages)
    assert part in str(caught.value)


def test_even():
    assert even(7, 3) == (3, 2, 2)
    assert even(8, 4) == (2, 2, 2, 2)


def language_model(vocab):
    """Llama 1B's feed-forward shapes (dim 2,048, 16 layers); attention's products without its scores. Nothing is allocated."""
    dim, ffn, num_layers = 2048, 8192, 16
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    weights = {"qkv": (dim, 3072), "out": (3072, dim), "gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)}
    params = {
        "embed": {"table": shape(vocab, dim)},
        "layers": {name: shape(num_layers, *dims) for name, dims in weights.items()},
        "head": {"out": shape(dim, vocab)},
    }

    def layer(p, x):
        x = x + jnp.tanh(x @ p["qkv"]) @ p["out"]
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    model = jzero.Pipeline(
        embed=lambda p, tokens: p["table"][tokens],
        layers=layer,
        head=lambda p, x, tokens: jnp.mean(jax.nn.logsumexp(x @ p["out"], -1)),
    )
    return model, params, jax.ShapeDtypeStruct((1, 512), jnp.int32)


def test_a_large_vocabulary_head():
    """By what the compiler counts, the best split's largest stage is 15% smaller than by layer count or by parameters."""
    model, params, tokens = language_model(128256)
    flops, sizes = (costs.of(model, params, tokens, by=by) for by in ("flops", "parameters"))
    assert flops.embed < 0.01 * flops.head
    assert sizes.embed == sizes.head == 2048 * 128256
    best = largest(flops, split(flops, 4))
    assert best <= 0.85 * largest(flops, even(16, 4))
    assert best <= 0.85 * largest(flops, split(sizes, 4))


def test_seconds_are_measured():
    model = jzero.Pipeline(lambda p, x: x @ p, lambda p, x: x @ p, lambda p, y, x: jnp.mean(y @ p))
    params = {"embed": jnp.ones((8, 8)), "layers": [jnp.ones((8, 8))] * 3, "head": jnp.ones((8, 8))}
    found = costs.of(model, params, jnp.ones((4, 8)), by="seconds")
    assert len(found.layers) == 3
    assert min(*found.layers, found.embed, found.head) > 0


def test_unknown_cost():
    model = jzero.Pipeline(lambda p, x: x, lambda p, x: x, lambda p, y, x: y)
    with pytest.raises(ValueError, match="Known: parameters, flops, seconds"):
        costs.of(model, {"embed": {}, "layers": jnp.ones((2, 2)), "head": {}}, jnp.ones(2), by="flop")
