"""Stages after training: which commands they are, and what is known before training about whether they will work."""

import dataclasses
import importlib.util
import sys

import pytest

from megatron_prune.commands import evaluate
from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.launch.jobs import after
from megatron_prune.testing.helpers.tiny_runs import prepare


@pytest.fixture
def config(tmp_path):
    """Data with a validation share, a source without weights."""
    plain = Config()
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, hf_model=str(tmp_path)),
        data=dataclasses.replace(plain.data, data_path="0.5 a 0.5 b", split="90,10,0", seq_length=64),
        training=dataclasses.replace(plain.training, eval_iters=3, global_batch_size=4, seed=7),
        checkpoint=dataclasses.replace(plain.checkpoint, save="runs/x"),
    )


def with_evaluation(config, **values):
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **values))


NO_HARNESS = "lm_eval is not installed (megatron-prune[eval]), which evaluation.eval_tasks needs"


def with_harness(monkeypatch, lacks=None):
    packages = {"lm_eval": object(), "accelerate": object(), "datasets": object()} | {lacks: None}
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages[name] if name in packages else found(name))


def options(job):
    """Option -> its words."""
    assert job.words[0] == sys.executable
    found = {}
    for word in job.words[4:]:
        if word.startswith("--"):
            name = word
            found[name] = []
        else:
            found[name].append(word)
    return found


def test_without_anything_named_the_runs_own_validation_samples_are_measured(config, tmp_path):
    asked = options(after.evaluate(config))
    assert asked["--data-path"] == ["0.5 a 0.5 b"], "a blend is one data set"
    assert (asked["--split"], asked["--seed"], asked["--seq-length"]) == (["90,10,0"], ["7"], ["64"])
    assert asked["--eval-samples"] == ["12"] and "--tasks" not in asked
    assert asked["--hf-model"] == ["runs/x/hf"] and asked["--output-dir"] == ["runs/x/evaluation"]
    (tmp_path / "model.safetensors").touch()
    assert options(after.evaluate(config))["--hf-model"] == [str(tmp_path), "runs/x/hf"]


def test_validation_data_of_their_own_are_measured_as_in_training(config):
    data = dataclasses.replace(config.data, valid_data_path="1 c 2 d", tokenizer_model="spm")
    asked = options(after.evaluate(dataclasses.replace(config, data=data)))
    assert (asked["--data-path"], asked["--split"], asked["--eval-samples"]) == (["1 c 2 d"], ["0,1,0"], ["12"])
    assert asked["--tokenizer-model"] == ["spm"], "for a source whose folder holds none"


def test_the_page_is_written_again_where_one_is_wanted(config, monkeypatch):
    pytest.importorskip("plotly", reason="needs plotly: install megatron-prune[report]")
    words = after.page(config).words
    assert words[3:] == ("report", "runs/x", "--output", "runs/x/report.html")
    without = dataclasses.replace(config, logging=dataclasses.replace(config.logging, report=False))
    assert after.page(without).words == ()


def test_what_is_named_for_it_comes_first(config):
    asked = options(after.evaluate(with_evaluation(config, eval_data_path="one.txt two.txt")))
    assert asked["--data-path"] == ["one.txt", "two.txt"] and "--eval-samples" not in asked
    asked = options(after.evaluate(with_evaluation(config, eval_data_path="1e-1 a .2 b")))
    assert asked["--data-path"] == ["1e-1 a .2 b"] and asked["--eval-samples"] == ["12"], "a blend has no end"


def test_tasks_wait_for_the_harness_and_the_rest_is_done(config, monkeypatch):
    config = with_evaluation(config, eval_tasks="piqa", eval_task_data="bench")
    with_harness(monkeypatch)
    asked = after.evaluate(config)
    assert asked.left_out is None
    assert (options(asked)["--tasks"], options(asked)["--task-data"]) == (["piqa"], ["bench"])
    with_harness(monkeypatch, "lm_eval")
    asked = after.evaluate(config)
    assert asked.left_out == NO_HARNESS and "--data-path" in options(asked) and "--tasks" not in options(asked)
    nothing = dataclasses.replace(config, data=dataclasses.replace(config.data, split="100,0,0"))
    assert after.evaluate(nothing) == after.Job((), NO_HARNESS)
    nothing = with_evaluation(nothing, eval_tasks=None)
    assert "no validation data" in after.evaluate(nothing).left_out


@pytest.mark.parametrize("lacks", ["lm_eval", "accelerate", "datasets"])
def test_what_the_harness_lacks_is_told_before_anything_is_computed(lacks, monkeypatch, tmp_path, capsys):
    """The harness itself does not require all that its model imports."""
    with_harness(monkeypatch, lacks)
    tiny = prepare(tmp_path)
    words = ["--hf-model", str(tiny.source), "--tokenizer-model", str(tiny.folder / "tokenizer.model")]
    assert evaluate.main([*words, "--tasks", "piqa", "--device", "cpu", "--output-dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and f"of which {lacks} is not installed" in printed.err
    assert not (tmp_path / "out").exists()


def test_mistakes_are_told_before_training(config, tmp_path, monkeypatch):
    with_harness(monkeypatch, "lm_eval")
    assert after.check(config) is None
    assert after.check(with_evaluation(config, eval_tasks="all")) == NO_HARNESS
    with pytest.raises(UserError, match=r"evaluation.eval_tasks \(--eval-tasks\): piqua is unknown; did you mean piqa"):
        after.check(with_evaluation(config, eval_tasks="piqua"))
    with pytest.raises(UserError, match=r"evaluation.eval_task_data \(--eval-task-data\) nowhere: is no folder"):
        after.check(with_evaluation(config, eval_tasks="piqa", eval_task_data="nowhere"))
    with pytest.raises(UserError, match=r"evaluation.eval_data_path \(--eval-data-path\): none.txt is neither"):
        after.check(with_evaluation(config, eval_data_path="none.txt"))


def test_a_stage_is_a_process_outside_of_the_ranks_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    words = ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    assert after.run([sys.executable, "-c", f"import os, sys; sys.exit(len({set(words)} & set(os.environ)) + 3)"]) == 3
