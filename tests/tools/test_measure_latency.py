"""megatron-prune measure-latency on a small model: a table that a target may name, and the time of one model."""

import json

import pytest

from megatron_prune.commands import measure_latency
from megatron_prune.testing.helpers.tiny_models import tiny_config


def test_a_table_and_one_model(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(num_hidden_layers=4)))
    quick = ["--hf-model", str(tmp_path), "--prompt-length", "8", "--decoded-tokens", "2", "--repeats", "1"]
    assert measure_latency.main([*quick, "--save", str(tmp_path / "table.json")]) == 0
    points = json.loads((tmp_path / "table.json").read_text())["points"]
    assert {point["shape"]["num_layers"] for point in points} == {4, 3, 2}
    assert len({json.dumps(point["shape"]) for point in points}) == len(points) >= 8
    assert all(point["milliseconds"] > 0 for point in points)
    assert measure_latency.main([*quick, "--phase", "prefill"]) == 0
    assert " ms (prefill, 1 x 8 tokens, float32)" in capsys.readouterr().out
    assert measure_latency.main([*quick, "--phase", "both"]) == 2
