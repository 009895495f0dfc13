"""--dry-run as a user meets it: what is missing is said, what is wrong is refused, and no process group is needed."""

import json
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
import torch.distributed as dist

from megatron_prune.config import load_config, validate
from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.launch.estimate.dry_run import NOT_HERE, estimate, look
from megatron_prune.pretrain import main
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

SHAPES = Path(__file__).resolve().parents[2] / "examples" / "configs" / "shapes"
VOCABULARY = 64


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A source model with its tokenizer, and data that goes with it."""
    folder = tmp_path_factory.mktemp("dry_run")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"the quick brown fox number {i} jumps over {i * 7} lazy dogs" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=VOCABULARY, minloglevel=2
    )
    hf_config = tiny_config(vocab_size=VOCABULARY)
    write_hf_folder(folder / "source", hf_config, random_llama_weights(hf_config))
    (folder / "tokenizer.model").rename(folder / "source" / "tokenizer.model")
    preprocess([str(text)], str(folder / "data"), Options(tokenizer_model=str(folder / "source")))
    return folder


def flags(folder, data="data", **changes):
    """A working command line over the workshop."""
    given = {
        "hf-model": folder / "source",
        "data-path": folder / data,
        "seq-length": 32,
        "prune-target-params": 20000,
        "train-iters": 2000,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    words = [["--" + name, *str(value).split()] for name, value in given.items() if value is not None]
    return ["--dry-run", *(word for group in words for word in group)]


def test_everything_here(workshop, capfd):
    assert main(flags(workshop, save=workshop / "out", tensor_model_parallel_size=2, world_size=8)) == 0
    report = capfd.readouterr().out
    assert "8 processes: TP 2 x PP 1 x DP 4" in report
    assert "complete" in report and "SentencePieceTokenizer, 64 ids" in report and "400 documents" in report
    assert NOT_HERE not in report
    for word in ("weights", "gradients", "optimizer", "activations", "Fisher", "FLOPs", "hours", "reduce", "scores"):
        assert word in report
    assert not (workshop / "out").exists() and not dist.is_initialized()


def test_what_is_not_here_is_said(workshop, tmp_path, capfd):
    (tmp_path / "bare").mkdir()
    shutil.copy(workshop / "source" / "config.json", tmp_path / "bare")
    blend = f"0.3 {workshop}/data 0.7 {tmp_path}/absent"
    assert main(flags(workshop, hf_model=tmp_path / "bare", data_path=blend)) == 0
    lines = capfd.readouterr().out.splitlines()
    missing = [line for line in lines if line.endswith(NOT_HERE)]
    assert len(missing) == 3
    assert any("weights" in m for m in missing) and any("tokenizer" in m for m in missing)
    assert any("absent" in m for m in missing) and any("400 documents" in line for line in lines)


def test_a_checkpoint_that_is_not_here_falls_back_on_the_source(workshop, tmp_path, capfd):
    assert main(flags(workshop, load=tmp_path / "later")) == 0
    assert f"checkpoint in {tmp_path / 'later'}" in capfd.readouterr().out
    assert main(flags(workshop, load=tmp_path / "later", hf_model=None)) == 2
    assert "name model.hf_model" in capfd.readouterr().err


MISTAKES = [
    ({"hf_model": "nowhere"}, "config.json"),
    ({"data_path": "0.3 DATA x absent"}, 'expected a weight, got "x"'),
    ({"data_path": "-1 absent 1 DATA"}, "the weight -1 is not between"),
    ({"data_path": "0.3 absent 0.7"}, "has no prefix"),
    ({"data_path": "HALF"}, "half"),
    ({"prune_target_params": 50}, "cannot be reached"),
    ({"prune_target_params": "1B"}, "not below the source's"),
    ({"seq_length": 256}, "beyond the model's 128 positions"),
    ({"prune_metric": "taylor_mxi"}, "did you mean"),
    (
        {"pipeline_model_parallel_size": 3, "world_size": 3, "global_batch_size": 9},
        "4 layers do not divide by 3 stages",
    ),
    ({"world_size": 7}, "not a multiple of micro_batch_size"),
    ({"save": "FILE"}, "is a file; give a folder"),
    ({"data_path": "ONE", "eval_interval": 5}, "leaves no document of"),
]


def test_a_folder_that_holds_a_run_is_told_not_refused(workshop, tmp_path, capfd):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    assert main(flags(workshop, save=tmp_path)) == 0
    assert "already holds a run's checkpoints; resume it with --load" in capfd.readouterr().out


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_are_refused_in_one_line(workshop, tmp_path, capfd, changes, words):
    (tmp_path / "half.bin").write_bytes(b"\0" * 64)
    (tmp_path / "one.txt").write_text("the quick brown fox " * 50)
    preprocess([str(tmp_path / "one.txt")], str(tmp_path / "one"), Options(tokenizer_model=str(workshop / "source")))
    names = {"HALF": "half", "FILE": "half.bin", "ONE": "one"}
    places = {"DATA": str(workshop / "data"), **{word: str(tmp_path / name) for word, name in names.items()}}
    for name, value in list(changes.items()):
        changes = changes | {name: " ".join(places.get(word, word) for word in str(value).split())}
    assert main(flags(workshop, **changes)) == 2
    captured = capfd.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ") and words in line and captured.out == ""


def test_damaged_weights_are_refused(workshop, tmp_path, capfd):
    shutil.copytree(workshop / "source", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert main(flags(workshop, hf_model=tmp_path / "source")) == 2
    assert "model.safetensors" in capfd.readouterr().err


def test_weights_that_contradict_config_json_are_refused(workshop, tmp_path, capfd):
    shutil.copytree(workshop / "source", tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 56}))
    assert main(flags(workshop, hf_model=tmp_path / "source")) == 2
    assert "wrong shape" in capfd.readouterr().err


def test_data_of_another_vocabulary_is_refused(workshop, tmp_path, capfd):
    hf_config = tiny_config(vocab_size=32)
    write_hf_folder(tmp_path / "small", hf_config, random_llama_weights(hf_config))
    assert main(flags(workshop, hf_model=tmp_path / "small", prune_target_params=15000)) == 2
    assert "vocabulary is 32" in capfd.readouterr().err


def test_too_few_iterations_are_noted(workshop, capfd):
    assert main(flags(workshop, train_iters=12, prune_ratio="1:1")) == 0
    assert "note: training.train_iters 12 ends the pruning phase before the target" in capfd.readouterr().out


def test_plain_training_has_no_pruning_lines(workshop, capfd):
    assert main(flags(workshop, prune_target_params=None)) == 0
    report = capfd.readouterr().out
    assert "training       2,000" in report and "pruning" not in report and "Fisher" not in report


@pytest.mark.parametrize(
    ("metric", "fisher", "expected"), [("taylor_mix", "adam", 0), ("taylor_first", "microbatch", 0)]
)
def test_the_fisher_buffer_is_there_only_when_needed(workshop, metric, fisher, expected):
    config = load_config(flags(workshop, prune_metric=metric, prune_fisher=fisher))
    assert estimate(config, look(config).architecture, 1).memory.fisher == expected
    config = load_config(flags(workshop))
    assert estimate(config, look(config).architecture, 1).memory.fisher == 4 * 4 * 32 * (32 + 48)


def test_seven_billion_parameters_on_64_ranks_take_seconds():
    words = f"--dry-run --hf-model {SHAPES}/Llama-7B --data-path absent --use-distributed-optimizer --bf16 "
    words += "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 512 "
    words += "--overlap-grad-reduce --overlap-param-gather --prune-target-params 2B"
    config = load_config(words.split())
    validate(config, 64)
    start = time.process_time()
    found = estimate(config, look(config).architecture, 64)
    assert time.process_time() - start < 15
    assert found.memory.weights == pytest.approx(2 * 6.74e9 / 4, rel=0.01)
    assert found.memory.stage == 0 and found.placement.in_flight(0) == 2
