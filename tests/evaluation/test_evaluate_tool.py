"""megatron-prune evaluate: several models side by side, checkpoints, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_prune.commands import evaluate
from megatron_prune.testing.helpers.ranks import run_ranks


def test_models_side_by_side(
    model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small = model_folders
    arguments = [
        "--hf-model",
        str(large),
        str(small),
        "--data-path",
        str(text_file),
        "--output-dir",
        str(tmp_path / "o"),
    ]
    assert evaluate.main([*arguments, "--seq-length", "32", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "o" / "evaluation.md").read_text() == out
    report = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert [model["name"] for model in report["models"]] == ["large", "small"]
    assert [model["hidden_size"] for model in report["models"]] == [48, 32]
    first, second = (model["perplexity"][0] for model in report["models"])
    assert first["tokens"] == second["tokens"] and first["loss"] != second["loss"]
    for one in (first, second):
        assert f"{one['loss']:.4f} ± {one['loss_stderr']:.4f}" in out and f"{one['bits_per_byte']:.4f}" in out
    header = next(line for line in out.splitlines() if line.startswith("| data"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["data", "measure", "large", "small"]


def import_checkpoint(_rank: int, _size: int, folder: str, save: str) -> int:
    """In a process of its own, since the tool sets up a runtime."""
    import os

    import torch.distributed as dist

    from megatron_prune.commands import convert_from_hf

    dist.destroy_process_group()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[variable]
    return convert_from_hf.main(["--hf-model", folder, "--save", save])


def test_checkpoint_is_judged_by_its_export(
    model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folders[0])
    assert run_ranks(import_checkpoint, 1, folder, str(tmp_path / "run")) == [0]
    more = ["--data-path", str(text_file), "--device", "cpu", "--output-dir", str(tmp_path)]
    assert evaluate.main(["--hf-model", folder, "--load", str(tmp_path / "run"), *more]) == 0
    models = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert [model["name"] for model in models] == ["large", "run at 0"]
    assert models[0]["perplexity"][0]["loss"] == models[1]["perplexity"][0]["loss"]
    capsys.readouterr()
    assert evaluate.main(["--load", str(tmp_path / "run")]) == 2  # it was imported, not trained
    assert "records no data set it was trained on" in capsys.readouterr().err


def test_the_dtype_shown_is_the_one_computed_in(
    model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data-path", str(text_file), "--device", "cpu", "--output-dir", str(tmp_path)]
    for given, shown in ((["--dtype", "bfloat16"], "bfloat16 (stored in float32)"), ([], "float32")):
        assert evaluate.main(["--hf-model", str(model_folders[1]), *given, *more]) == 0
        assert f"| {shown} |" in capsys.readouterr().out
        (found,) = json.loads((tmp_path / "evaluation.json").read_text())["models"]
        assert found["dtype"] == shown.partition(" ")[0] and found["stored_dtype"] == "float32"


def test_mistakes_are_one_line(
    model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(model_folders[0])
    config = json.loads((model_folders[0] / "config.json").read_text())
    with_code = shutil.copytree(folder, tmp_path / "with_code")
    (with_code / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    cases = {
        "brings code of its own": ["--hf-model", str(with_code), "--data-path", str(text_file)],
        "--device warp:9: cannot be used": ["--hf-model", folder, "--data-path", str(text_file), "--device", "warp:9"],
        "name a model": [],
        "say what to measure": ["--hf-model", folder],
        "config.json: does not exist": ["--hf-model", str(tmp_path), "--data-path", str(text_file)],
        "is named twice": ["--hf-model", folder, folder, folder, "--data-path", str(text_file)],
        "neither a text file nor": ["--hf-model", folder, "--data-path", "nowhere"],
        "did you mean piqa?": ["--hf-model", folder, "--tasks", "piqua"],
        "--batch-size must be at least 1, got 0": [
            "--hf-model",
            folder,
            "--data-path",
            str(text_file),
            "--batch-size",
            "0",
        ],
        "--dtype: expected one of float32, bfloat16, float16": [
            "--hf-model",
            folder,
            "--data-path",
            str(text_file),
            "--dtype",
            "int4",
        ],
        "no such folder": ["--load", str(tmp_path / "nowhere"), "--data-path", str(text_file)],
    }
    for words, arguments in cases.items():
        assert evaluate.main(arguments) == 2, words
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err, captured.err


def test_a_damaged_model_is_told_before_the_first_is_judged(
    model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tasks would give it a plausible score: of NaN everywhere the first answer is the best."""
    damaged = Path(shutil.copytree(model_folders[1], tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    assert evaluate.main(["--hf-model", str(model_folders[0]), str(damaged), "--data-path", str(text_file)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1, told.err
    assert "damaged/model.safetensors: model.norm.weight: 1 of " in told.err and "NaN or infinite" in told.err


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.md"])
def test_a_report_that_cannot_be_written_is_one_line(
    name: str, model_folders: tuple[Path, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    words = ["--hf-model", str(model_folders[0]), "--data-path", str(text_file), "--device", "cpu"]
    assert evaluate.main([*words, "--eval-samples", "1", "--output-dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"--output-dir {tmp_path}: cannot be written: Is a directory" in err and "Traceback" not in err
    assert not list(tmp_path.glob("*.tmp"))
