"""Leaf -> spec: the ZeRO rule, stacked layers, the user's rules, the batch, and every error."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jzero._types import Leaf
from jzero.mesh import make_mesh
from jzero.rules import batch_spec, check_batch, place, stacked_dims

F32 = np.dtype("float32")
ALL = frozenset({"params", "opt_state"})
MESHES = {
    "1": make_mesh(devices=jax.devices()[:1]),
    "2": make_mesh(devices=jax.devices()[:2]),
    "3": make_mesh(devices=jax.devices()[:3]),
    "8": make_mesh(),
    "2x4": make_mesh(replica=2),
    "4 tensor": make_mesh(tensor=2),
}


def params(**shapes):
    """Parameters; `__` in a name is a step of the path."""
    pairs = enumerate(shapes.items())
    return [Leaf(name.replace("__", "/"), shape, F32, "params", i) for i, (name, shape) in pairs]


def with_moments(leaves):
    """The parameters, one moment and one average of each, and a counter."""
    moments = [leaf._replace(path=f"mu/{leaf.path}", role="opt_state") for leaf in leaves]
    average = [leaf._replace(path=f"ema/{leaf.path}", role="other") for leaf in leaves]
    return [*leaves, *moments, *average, Leaf("count", (), np.dtype("int32"), "opt_state", None)]


def specs(leaves, mesh="8", roles=ALL, **options):
    placements = place(leaves, mesh=MESHES[mesh], shard_roles=roles, **options)
    return {placement.leaf.path: placement.spec for placement in placements}


def why(leaf, mesh="8", **options):
    return place([leaf], mesh=MESHES[mesh], shard_roles=ALL, **options)[0].why


# The ZeRO rule ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mesh", "spec"),
    [
        ((512, 2048), "8", P(None, "data")),
        ((2048, 512), "8", P("data")),
        ((64, 64), "8", P(None, "data")),  # a tie goes to the last dim
        ((50257, 768), "8", P(None, "data")),  # the largest that divides
        ((50257, 769), "8", P()),
        ((1024,), "8", P("data")),
        ((1016,), "8", P()),  # under min_shard_elements
        ((50257, 768), "3", P(None, "data")),
        ((2048, 512), "1", P()),
        ((2048, 512), "2x4", P("data")),
        ((64, 8, 12), "8", P(None, "data")),  # dim 0 of three dims only as a last resort
        ((64, 12, 12), "8", P("data")),
        ((3, 3, 64, 128), "8", P(None, None, None, "data")),
        ((), "8", P()),
        ((0, 8), "8", P()),
    ],
)
def test_the_largest_dim_that_data_divides(shape, mesh, spec):
    assert specs(params(w=shape), mesh) == {"w": spec}


def test_reasons_are_given():
    assert why(params(w=(16,))[0]) == "16 elements, under min_shard_elements=1024"
    assert why(params(w=(101, 103))[0]) == "no dim of float32[101,103] is a multiple of 8"
    assert why(params(w=(512, 2048))[0]) == "dim 1 of size 2048 over 'data' (8)"
    assert "size 1" in why(params(w=(512, 2048))[0], "1")


def test_leaves_that_mirror_follow_their_parameter():
    leaves = with_moments(params(w=(512, 2048), b=(16,)))
    assert specs(leaves) == {
        **{path: P(None, "data") for path in ("w", "mu/w", "ema/w")},
        **{path: P() for path in ("b", "mu/b", "ema/b", "count")},
    }
    at_stage_1 = specs(leaves, roles=frozenset({"opt_state"}))  # an opaque step: parameters and their average whole
    assert (at_stage_1["w"], at_stage_1["mu/w"], at_stage_1["ema/w"]) == (P(), P(None, "data"), P())
    assert set(specs(leaves, roles=frozenset()).values()) == {P()}


def test_optimizer_leaves_without_a_parameter_take_the_general_rule():
    factor = Leaf("v_row", (4096,), F32, "opt_state", None)
    assert specs([factor]) == {"v_row": P("data")}
    assert specs([factor], min_shard_elements=4097) == {"v_row": P()}
    assert specs([factor._replace(role="other")]) == {"v_row": P()}


shapes = st.lists(st.sampled_from([1, 2, 3, 7, 8, 12, 24, 64, 129]), max_size=4).map(tuple)


@given(st.lists(shapes, min_size=1, max_size=5), st.sampled_from(list(MESHES)), st.sampled_from([1, 64, 1024]))
@settings(max_examples=150, deadline=None)
def test_every_spec_is_legal_and_none_is_missed(found, name, least):
    mesh = MESHES[name]
    leaves = with_moments(params(**{f"module{i}__w": shape for i, shape in enumerate(found)}))
    placements = place(leaves, mesh=mesh, shard_roles=ALL, min_shard_elements=least, stacked=[None] * len(leaves))
    for placement in placements:
        shape, size = placement.leaf.shape, mesh.shape["data"]
        NamedSharding(mesh, placement.spec).shard_shape(shape)  # raises for what jax would not take
        divides = [dim for dim in shape if dim % size == 0]
        must = size > 1 and math.prod(shape) >= least and bool(divides)
        assert (placement.spec != P()) == must, placement
        owner = placement.leaf.owner
        assert owner is None or placement.spec == placements[owner].spec


# Stacked layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "stacked"),
    [
        ({"layers__w1": (8, 64, 64), "layers__norm": (8, 64), "embed": (512, 64)}, {"layers/w1", "layers/norm"}),
        ({"h__attn__q": (12, 64, 4, 16), "h__attn__bias": (12, 4, 16), "h__ln": (12, 64)}, {"h/attn/q", "h/attn/bias", "h/ln"}),
        ({"layers__w": (8, 64, 64)}, {"layers/w"}),  # one shape, but named like a stack
        ({"ScanBlock_0__w": (8, 64, 64)}, {"ScanBlock_0/w"}),
        ({"w": (8, 64, 64)}, set()),
        ({"layers__0__q__kernel": (64, 8, 8)}, set()),  # a list of layers: heads, not a stack
        ({"q__kernel": (64, 8, 8), "q__bias": (8, 8), "out__kernel": (8, 8, 64)}, set()),
        ({"q__kernel": (64, 8, 8), "k__kernel": (64, 8, 8)}, set()),
        ({"wq": (64, 64), "wk": (64, 64), "wv": (64, 64), "wo": (64, 64)}, set()),
        ({"conv__kernel": (3, 3, 8, 16), "conv__bias": (16,)}, set()),
        ({"q": (768, 12, 64), "kv": (768, 2, 64)}, set()),  # no model has 768 layers
        ({"layers__w": (8, 64, 64), "layers__scale": ()}, set()),
        ({"layers__w": (8, 64), "layers__b": (8,)}, set()),
    ],
)
def test_stacks_are_told_by_shape(shapes, stacked):
    leaves = with_moments(params(**shapes))
    found = {leaf.path for leaf, dim in zip(leaves, stacked_dims(leaves), strict=True) if dim == 0}
    assert found == {prefix + path for path in stacked for prefix in ("", "mu/", "ema/")}


def test_the_layer_dim_is_never_sharded():
    layers = params(layers__w=(64, 24, 9), layers__norm=(64, 9), layers__u=(64, 9, 9))
    leaves = with_moments(layers)
    found = specs(leaves)
    assert found["layers/w"] == found["mu/layers/w"] == P(None, "data")
    assert found["layers/u"] == found["layers/norm"] == P()
    assert "only dims [1, 2] are free" in place(leaves, mesh=MESHES["8"], shard_roles=ALL, min_shard_elements=1)[2].why
    told = place(leaves, mesh=MESHES["8"], shard_roles=ALL, stacked=[None] * len(leaves))
    assert told[2].spec == P("data")


# The user's rules -------------------------------------------------------------------------------------------------------------


def test_rules_go_before_the_zero_rule():
    leaves = with_moments(params(embed=(512, 64), block__w1=(64, 256), block__w2=(256, 64), bias=(2048,), head=(64, 512)))
    rules = [
        (r"block/w1$", P(None, "tensor")),
        (r"^embed", P("data", None)),
        (r"bias", P("tensor")),
        lambda path, leaf: P() if path == "head" and leaf.shape == (64, 512) else None,
        (r"w1|w2", P(("tensor", "data"))),
    ]
    found = specs(leaves, "4 tensor", rules=rules)
    for prefix in ("", "mu/", "ema/"):
        assert found[prefix + "block/w1"] == P("data", "tensor")  # what is left is sharded over data
        assert found[prefix + "embed"] == P("data")  # final
        assert found[prefix + "bias"] == P("tensor")  # no dim left
        assert found[prefix + "head"] == P()  # whole on purpose
        assert found[prefix + "block/w2"] == P(("tensor", "data"))
    unsharded = specs(leaves, "4 tensor", rules=rules, roles=frozenset())
    assert unsharded["block/w1"] == unsharded["mu/block/w1"] == P(None, "tensor")
    assert unsharded["block/w2"] == P("tensor")
    assert unsharded["embed"] == P()


def test_the_first_match_wins():
    leaves = params(embed=(512, 64))
    assert specs(leaves, rules=[("embed", P()), ("embed", P("data"))]) == {"embed": P()}
    assert specs(leaves, rules=[("embed", P("data")), ("embed", P())]) == {"embed": P("data")}


def test_axes_of_size_one_are_no_axes():
    """One rule table serves every mesh: make_mesh leaves out axes of size 1."""
    assert specs(params(w=(512, 64)), "8", rules=[("w", P(None, "tensor"))]) == {"w": P("data")}


def test_a_rule_may_reach_leaves_that_mirror_nothing():
    leaves = [*params(w=(512, 64)), Leaf("table", (512, 3), F32, "other", None), Leaf("v_row", (512,), F32, "opt_state", None)]
    found = specs(leaves, rules=[("table", P("data")), ("v_row", P("data"))])
    assert (found["table"], found["v_row"]) == (P("data"), P("data"))
    assert specs(leaves, roles=frozenset(), rules=[("table|v_row", P("data"))]) == {"w": P(), "table": P(), "v_row": P()}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("embd", P("data")), ("w", P())], ["1 of 2 patterns match nothing", "'embd'", "paths: w, b"]),
        ([("mu/w", P("data"))], ["match nothing", "mu/w follows w"]),
        ([("w", P("tensr"))], ["unknown axis 'tensr'", "Did you mean 'tensor'?", "float32[512,64]"]),
        ([("w", P(None, None, "data"))], ["3 entries for 2 dims"]),
        ([("b", P("data"))], ["dim 0 has size 12, not a multiple of 8"]),
        ([("w", P("data", "data"))], ["axis 'data' appears 2 times"]),
        ([("w", P(("data", "data")))], ["axis 'data' appears 2 times"]),
        ([("w", P(P.UNCONSTRAINED))], ["entries are axis names"]),
        ([lambda path, leaf: "data"], ["a str is no PartitionSpec"]),
        ([("w(", P())], ["no regular expression"]),
    ],
)
def test_rules_that_are_wrong(rules, words):
    with pytest.raises(ValueError, match=r"^jzero.shard: rules=: ") as error:
        specs(with_moments(params(w=(512, 64), b=(12,))), rules=rules)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("rule", ["w", ("w",), ("w", "data"), (P(), "w"), P("data")])
def test_rules_of_another_kind(rule):
    with pytest.raises(TypeError, match=r"^jzero.shard: rules=: "):
        specs(params(w=(512, 64)), rules=[rule])


def test_every_wrong_leaf_is_listed():
    with pytest.raises(ValueError, match="2 leaves cannot take") as error:
        specs(params(a=(9, 64), b=(10, 64), c=(16, 64)), rules=[("a|b|c", P("data"))])
    assert "dim 0 has size 9" in str(error.value)
    assert "dim 0 has size 10" in str(error.value)


def test_indivisible_leaves_are_an_error_on_request():
    leaves = with_moments(params(w=(512, 64), vocab=(50257,), odd=(33, 35), tiny=(7,), layers__a=(64, 9, 9), layers__n=(64, 9)))
    with pytest.raises(ValueError, match=r"^jzero.shard: 12 of 19 leaves cannot be split over axis 'data' \(size 8\)") as error:
        specs(leaves, on_indivisible="error", min_shard_elements=512, roles=ALL)
    text = str(error.value)
    assert "mu/vocab" in text
    assert "same" in text
    assert "dim 0 has size 50257: no multiple of 8" in text
    assert "dim 0 of vocab to 50264" in text
    assert "dim 1 of odd to 40" in text
    assert "dim 2 of layers/a to 16" in text
    assert "tiny" not in text
    assert "mesh {'data': 8}" in text
    with pytest.raises(ValueError, match=r"mu/vocab +float32\[50257\] +dim 0 has size 50257") as error:
        specs(leaves, on_indivisible="error", roles=frozenset({"opt_state"}))
    assert "dim 0 of mu/vocab to 50264" in str(error.value)
    assert specs(leaves, min_shard_elements=512)["vocab"] == P()
    assert specs(leaves, on_indivisible="error", min_shard_elements=512, roles=frozenset())["vocab"] == P()
    tensor_only = params(bias=(2048,))  # nothing is left to split, so there is nothing to mend
    assert specs(tensor_only, "4 tensor", rules=[("bias", P("tensor"))], on_indivisible="error") == {"bias": P("tensor")}
    with pytest.raises(ValueError, match="on_indivisible='eror'") as error:
        specs(leaves, on_indivisible="eror")
    assert "Did you mean 'error'?" in str(error.value)


# The batch --------------------------------------------------------------------------------------------------------------------


def test_zero_shards_over_data_and_sequence():
    """Over dims of their own where there are two, else both over one; a dim that `sequence` does not divide stays as it was."""
    mesh = make_mesh(data=2, sequence=4)
    shapes = {"w": (64, 32), "b": (64,), "tensor": (64, 33), "odd": (33, 2)}
    leaves = [Leaf(name, shape, np.dtype("float32"), "params", i) for i, (name, shape) in enumerate(shapes.items())]
    sharded = place(leaves, mesh=mesh, shard_roles=frozenset({"params"}), min_shard_elements=1)
    assert [one.spec for one in sharded] == [
        P("data", "sequence"),
        P(("data", "sequence")),
        P(("data", "sequence")),
        P(None, "data"),
    ]
    assert sharded[-1].why.endswith("'sequence' (4) divides none of what is left")
    whole = place(leaves, mesh=mesh, shard_roles=frozenset(), min_shard_elements=1)
    assert all(one.spec == P() for one in whole)


def test_batch_leaves_are_split_over_sequence_where_it_divides():
    mesh = make_mesh(data=2, sequence=4)
    assert batch_spec(np.zeros((4, 16), "int32"), mesh) == P("data", "sequence")
    assert batch_spec(np.zeros((4, 17), "int32"), mesh) == P("data")
    assert batch_spec(np.zeros(4, "int32"), mesh) == P("data")


def test_batch_leaves_are_split_over_the_batch_axes():
    tokens = jax.ShapeDtypeStruct((16, 128), "int32")
    assert batch_spec(tokens, MESHES["8"]) == P("data")
    assert batch_spec(tokens, MESHES["2x4"]) == P(("replica", "data"))
    assert batch_spec(np.zeros(8, "uint32"), MESHES["8"]) == P("data")
    whole = [
        jax.random.key(0),
        jax.random.split(jax.random.key(0), 3),
        jax.random.PRNGKey(0),
        3,
        0.5,
        jnp.ones(()),
        np.float32(1),
    ]
    assert all(batch_spec(leaf, MESHES["8"]) == P() for leaf in whole)
    with pytest.raises(ValueError, match="x   float32\\[12\\]"):
        batch_spec(jnp.zeros(12), MESHES["8"], "x")


def test_batches_that_do_not_split_name_legal_sizes():
    batch = {"x": jnp.zeros((30, 2)), "y": jnp.zeros(30), "z": jnp.zeros(64), "key": jax.random.key(0), "scale": 2.0}
    with pytest.raises(ValueError, match="cannot be split into 16 equal parts") as error:
        check_batch(batch, MESHES["2x4"], accumulate=2)
    text = str(error.value)
    for word in [
        "x   float32[30,2]",
        "y   float32[30]",
        "16 or 32",
        "jzero.pad_batch(batch, 16)",
        "replica 2 x data 4 x accumulate 2",
    ]:
        assert word in text
    assert "z  " not in text
    with pytest.raises(ValueError, match="Use a batch of 8, or"):
        check_batch(jnp.zeros(5), MESHES["8"], 1)
    with pytest.raises(ValueError, match="Use a batch of 16 or 32"):
        check_batch(jnp.zeros(24), MESHES["2x4"], accumulate=2)
    check_batch({"x": jnp.zeros((32, 2))}, MESHES["2x4"], 2)
