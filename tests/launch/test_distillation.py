"""Learning from a teacher, from the command line: what is shown, resumed, refused and estimated."""

import json
import re
import shutil

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import prepare

DISTILLED = ("--distill-weight", 0.9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


def run(words, ranks=1, exit_code=0):
    fates = watch_ranks(victim, ranks, main, [str(word) for word in words])
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


def values(name, output):
    return [float(value) for value in re.findall(rf"{name}: ([0-9.E+-]+) \|", output)]


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)])
def test_the_source_teaches_and_a_resumed_run_goes_the_same_way(tiny, tmp_path, layout):
    ranks = 2 if layout else 1
    output = run(tiny.arguments(tmp_path / "whole", *DISTILLED, *layout), ranks)
    losses, entropies, divergences = (values(name, output) for name in ("distilled loss", "lm loss", "divergence"))
    assert abs(divergences[0]) < 1e-6, "before the first step the source differs in nothing from itself"
    assert max(divergences) > 1e-3
    assert losses == pytest.approx([0.1 * e + 0.9 * d for e, d in zip(entropies, divergences, strict=True)], rel=1e-5)
    run(tiny.arguments(tmp_path / "parts", *DISTILLED, *layout, "--exit-interval", 7), ranks)
    run(tiny.arguments(tmp_path / "parts", *DISTILLED, *layout), ranks)
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


def test_a_run_of_ones_own_is_a_teacher(tiny, tmp_path):
    """The checkpoints of a run that only trained: by its folder, on another layout."""
    run(
        tiny.arguments(
            tmp_path / "teacher", "--prune-target-params", "null", "--train-iters", 5, "--continue-tokens", 0
        )
    )
    taught = ("--distill-teacher", tmp_path / "teacher", "--exit-interval", 3)
    output = run(tiny.arguments(tmp_path / "run", *DISTILLED, *taught, "--tensor-model-parallel-size", 2), 2)
    assert values("divergence", output)[0] > 1e-4 and "teacher: " in output


def test_another_teacher_is_refused_where_a_run_goes_on(tiny, tmp_path):
    run(tiny.arguments(tmp_path / "run", *DISTILLED, "--exit-interval", 3))
    other = write_hf_folder(tmp_path / "other", read_config(tiny), random_llama_weights(read_config(tiny), seed=8))
    words = tiny.arguments(tmp_path / "run", *DISTILLED, "--distill-teacher", other)
    assert "is not the teacher that the checkpoint's run learns from" in run(words, exit_code=2)
    moved = tmp_path / "moved"
    shutil.copytree(tiny.source, moved)
    run(tiny.arguments(tmp_path / "run", *DISTILLED, "--distill-teacher", moved, "--exit-interval", 2))


def test_a_teacher_of_other_words_is_refused(tiny, tmp_path):
    larger = tiny_config(vocab_size=72)
    other = write_hf_folder(tmp_path / "other", larger, random_llama_weights(larger))
    for more in ((), ("--dry-run",)):
        words = tiny.arguments(tmp_path / "run", *DISTILLED, "--distill-teacher", other, *more)
        assert "a vocabulary of 72 ids and the model in training one of 64" in run(words, exit_code=2)
    words = tiny.arguments(tmp_path / "run", *DISTILLED, "--distill-teacher", tmp_path / "nowhere")
    assert "nowhere" in run(words, exit_code=2) and not (tmp_path / "run").exists()


def read_config(tiny):
    return json.loads((tiny.source / "config.json").read_text())


def test_the_dry_run_counts_the_teacher(tiny, tmp_path):
    def flops(output):
        return [
            float(line.split()[3])
            for line in output.splitlines()
            if line.strip().startswith(("pruning  ", "continued"))
        ]

    plain = run(tiny.arguments(tmp_path / "run", "--dry-run"))
    taught = run(tiny.arguments(tmp_path / "run", *DISTILLED, "--dry-run"))
    assert "teacher and its logits" in taught and "teacher" not in plain
    assert all(1.2 < with_it / without < 1.9 for with_it, without in zip(flops(taught), flops(plain), strict=True))


def test_the_source_is_trained_first_and_once(tiny, tmp_path):
    """Half of it, the rest, then the run; what is done is not done again."""
    words = tiny.arguments(tmp_path / "run", *DISTILLED, "--distill-teacher-tokens", 6 * 64)
    output = run([*words, "--exit-interval", 4])
    assert "the source is trained first, for 6 iterations" in output and "digest" not in output
    assert CheckpointReader(tmp_path / "run/teacher").record.iteration == 4
    output = run(words)
    assert "digest" in output and CheckpointReader(tmp_path / "run/teacher").record.iteration == 6
    assert values("divergence", output)[0] > 1e-4
    once = run(tiny.arguments(tmp_path / "once", *DISTILLED, "--distill-teacher-tokens", 6 * 64))
    assert values("divergence", output) == values("divergence", once)
    assert "trained first" not in run([*words, "--continue-tokens", 8 * 64])
    refused = tiny.arguments(tmp_path / "other", "--distill-teacher-tokens", 64)
    assert "needs a weight above 0" in run(refused, exit_code=2)
