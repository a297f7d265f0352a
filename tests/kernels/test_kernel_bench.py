"""The command line of the kernels' bench on a CPU: every implementation has a row, timed or with the reason why not."""

import json

import pytest

from pallas_kernels.bench.cases import cases
from pallas_kernels.bench.main import main


def test_a_run_leaves_json_and_a_picture(tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ["--op", "norm", "--shape", "gpt2-124m", "--rounds", "2", "--json", str(out), "--plot", str(picture)]
    assert main(words) == 0
    said = json.loads(out.read_text())
    rows = {row["implementation"]: row for row in said["runs"][0]["results"]}
    assert rows["reference"]["seconds"]["min"] > 0
    assert "GPU" in rows["mosaic_gpu"]["refused"]
    assert "TPU" in rows["mosaic_tpu"]["refused"]
    assert said["tiny"]
    assert picture.stat().st_size > 1000
    assert "1.00 of the best" in capsys.readouterr().out


def test_rivals_have_rows_too(capsys):
    assert main(["--op", "fused_adamw", "--shape", "llama-8b norms", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("reference", "optax", "copy"))
    assert "mosaic_tpu  not run" in said


@pytest.mark.parametrize(("words", "hint"), [(["--op", "norms"], "'norm'"), (["--shape", "llama-8"], "'llama-8b'")])
def test_what_is_not_known_is_suggested(words, hint, capsys):
    assert main(words) == 2
    assert f"Did you mean {hint}" in capsys.readouterr().err


def test_every_shape_has_a_case():
    assert {op for op, _ in cases(tiny=True, dtype="float32")} == {
        "attention", "norm", "linear_cross_entropy_sum", "quantize", "fused_adamw", "fused_lion",
    }  # fmt: skip
    for case in cases(tiny=False, dtype="bfloat16").values():
        assert case.num_bytes > 0
