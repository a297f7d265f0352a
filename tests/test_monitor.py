"""Metrics on disk: one line per step, none twice and none missing after a run was killed and resumed."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import pytest
from tensorboardX import proto

from jzero.monitor import FILE, Monitor


def rows(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_scalars_are_written_under_their_names(tmp_path):
    with Monitor(tmp_path, tensorboard=False) as monitor:
        monitor.write(1, {"loss": jnp.float32(0.1), "aux": {"tokens": 3}, "logits": jnp.ones(4), "none": None})
        assert not (tmp_path / FILE).read_text(), "the last step is not waited for"
        monitor.flush()
        assert rows(tmp_path) == [{"step": 1, "loss": float(jnp.float32(0.1)), "aux/tokens": 3}]
        monitor.write(2, {"loss": float("nan")})
    assert math.isnan(rows(tmp_path)[1]["loss"])


def test_a_resumed_run_writes_its_lines_again(tmp_path):
    with Monitor(tmp_path, tensorboard=False) as monitor:
        for i in (1, 2, 3, 4):
            monitor.write(i, {"loss": i})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    with Monitor(tmp_path, first_step=3, tensorboard=False) as monitor:
        monitor.write(3, {"loss": 30})
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 30]


def test_event_files(tmp_path):
    """Read back with tensorboardX's own protocol buffers: the values, and the mark that hides what a killed run wrote."""
    with Monitor(tmp_path, first_step=7) as monitor:
        monitor.write(7, {"loss": 0.5})
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events, data = [], file.read_bytes()
    while data:  # the framing: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(proto.event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value] == [
        (7, "loss", 0.5)
    ]
    assert [event.step for event in events if event.session_log.status] == [7]


def test_without_tensorboardx_the_error_says_what_to_do(tmp_path):
    script = f"import sys; sys.modules['tensorboardX'] = None; import jzero.monitor; jzero.monitor.Monitor({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "jzero[train]"' in done.stderr


def test_progress_lines(tmp_path, capsys):
    with Monitor(tmp_path, num_steps=3, tensorboard=False, every=1e9) as monitor:
        for i in (1, 2, 3):
            monitor.write(i, {"loss": 1 / i})
    printed = capsys.readouterr().err
    assert printed.startswith("step 3/3  loss 0.3333  ")
    assert printed.count("\n") == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Monitor(tmp_path / "file" / "run", tensorboard=False)
