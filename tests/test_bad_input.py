"""Bad input is met with a message in five parts, before anything is allocated or compiled.

Every entry of the table says which words each part must have: who speaks and what was expected, what was met, the context where
there is one, a way out.
"""

import gc

import jax
import jax.numpy as jnp
import mistakes
import mistakes_offload
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from mistakes import ROWS, TX, Bad, own_step, params, prints_in_order

import jzero

TABLE = mistakes.TABLE | mistakes_offload.TABLE
compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """What a worker has gathered by now is looked through at every collection otherwise, for seconds each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_explained_before_anything_happens(name):
    bad = TABLE[name]()
    gc.collect()
    arrays, num_events = {id(array) for array in jax.live_arrays()}, len(compiled)
    with pytest.raises(bad.error) as caught:
        bad.call()
    text = str(caught.value)
    del caught
    gc.collect()
    assert {id(array) for array in jax.live_arrays()} <= arrays, "something was allocated"
    assert not any("backend_compile" in event for event in compiled[num_events:]), "something was compiled"
    check_parts(bad, text)


def check_parts(bad: Bad, text: str) -> None:
    first, *lines = text.splitlines()
    who, _, problem = first.partition(": ")
    assert (who, bad.expected in problem) == (bad.who, True), text
    found = [line for line in lines if line.startswith("  ")]
    rest = "\n".join(line for line in lines if not line.startswith("  ") or bad.context in line)
    for words in bad.found:
        assert any(words in line for line in found), f"{words!r} is not among what was found:\n{text}"
    assert bad.context in rest, f"the context {bad.context!r} is missing:\n{text}"
    assert bad.fix in lines[-1] or any(bad.fix in line for line in lines if not line.startswith("  ")), f"no way out:\n{text}"


def test_a_state_on_one_device_is_a_state_elsewhere():
    step = jzero.shard(own_step, stage=3)
    state = jax.device_put((params(), TX.init(params())), jax.devices()[1])
    with pytest.raises(ValueError, match="SingleDeviceSharding on 1 device"):
        step(state, jnp.ones(ROWS))
    moved = jax.device_put(state, NamedSharding(step.mesh, PartitionSpec()))
    with pytest.raises(ValueError, match=r"0/w .* P\(\) on mesh \{'data': 8\} +expected P\('data',\)"):
        step(moved, jnp.ones(ROWS))


def test_one_device_has_room_for_ordered_effects(capfd):
    own = jzero.make_train_step(prints_in_order, TX)
    step = jzero.shard(own, stage=3, mesh=jzero.make_mesh(devices=jax.devices()[:1]))
    step(step.place(own.init(params())), jnp.ones(ROWS))
    jax.effects_barrier()
    assert "1.0" in capfd.readouterr().out
