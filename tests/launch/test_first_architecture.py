"""A found shape: trained from scratch, or cut out of the source at once."""

import json

import pytest

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import prepare

PLAIN = ("--prune-target-params", "null", "--prune-ratio", "null", "--continue-tokens", 0, "--train-iters", 4)


def run(words, ranks=1, exit_code=0):
    fates = watch_ranks(victim, ranks, main, [str(word) for word in words])
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """The newest checkpoint of a pruned run."""
    folder = tmp_path_factory.mktemp("pruned") / "run"
    run(tiny.arguments(folder))
    return CheckpointReader(folder)


@pytest.mark.parametrize("init", ["random", "source"])
@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", 2)])
def test_a_found_shape_trains(tiny, pruned, tmp_path, init, layout):
    file = pruned.path / "architecture.json"
    words = tiny.arguments(tmp_path / "run", *PLAIN, "--architecture", file, "--init", init, *layout)
    output = run(words, 2 if layout else 1)
    assert f"{pruned.architecture.parameters} parameters to start with" in output
    mine = CheckpointReader(tmp_path / "run")
    assert mine.architecture == pruned.architecture and not mine.record.state["history"]
    dry = run([*words, "--dry-run", "--world-size", 2 if layout else 1])
    assert f"{pruned.architecture.parameters:,}" in dry


def test_one_of_another_model_is_refused(tiny, pruned, tmp_path):
    file, wider = pruned.path / "architecture.json", tiny_config(intermediate_size=52)
    other = write_hf_folder(tmp_path / "other", wider, random_llama_weights(wider))
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps({"shape": 3}))
    for words, complaint in (
        (("--architecture", file, "--hf-model", other), "is of another model than"),
        (("--architecture", damaged), "not an architecture of this project"),
        (("--architecture", tmp_path / "nowhere"), "nowhere"),
    ):
        output = run(tiny.arguments(tmp_path / "run", *PLAIN, *words), exit_code=2)
        assert complaint in output.splitlines()[-1], output
