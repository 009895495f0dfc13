"""The run's state and the random generators come back; a save beside the training stores what was there before."""

import random

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.files import CheckpointSaveError
from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.plain import decode, encode
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import AsyncSaver, save_checkpoint
from megatron_prune.checkpoint.storage import SaveTask
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import STATE, Kind, build, same, tensors, train


def test_state_survives_with_its_types():
    state = {
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "tensor": torch.tensor([1.5], dtype=torch.bfloat16),
        "nested": [{"a": (1, None, True)}, {3: "text"}],
        "scalar": np.float64(0.1),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    copy = decode(encode(state))
    state["array"][0] = 9  # a snapshot, not a view
    assert copy["array"].dtype == np.int32 and copy["array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["tensor"].dtype == torch.bfloat16 and copy["tensor"].tolist() == [1.5]
    assert copy["nested"] == [{"a": (1, None, True)}, {3: "text"}]
    assert copy["scalar"] == 0.1 and type(copy["scalar"]) is float
    assert copy["empty"].shape == (0, 4)
    with pytest.raises(TypeError, match=r"state\['f'\]\[1\]: function cannot be stored"):
        encode({"f": [1, test_state_survives_with_its_types]})


def draw():
    return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002


def save_beside_training(rank, world, folder):
    """An asynchronous save, training over it, a failing one, and what comes after; numbers drawn before and after."""
    model, saver = build(Kind(distributed=True)), AsyncSaver()
    train(model, 0)
    torch.manual_seed(5 + rank)
    save_checkpoint(model, f"{folder}/at_once", 1, STATE)
    state = {**STATE, "smoothing": np.ones(3)}
    assert save_checkpoint(model, f"{folder}/beside", 1, state, saver=saver) is None
    drawn = draw()
    state["smoothing"] *= 7
    losses = [train(model, 1)]
    published = saver.finalize(blocking=True)
    assert published is not None and published.name == "iter_0000001"
    assert saver.finalize(blocking=True) is None and not saver.is_busy
    failed = fail_beside(model, saver, folder, rank)
    save_checkpoint(model, f"{folder}/beside", 3, STATE, saver=saver)
    while saver.is_busy:
        saver.finalize(blocking=False)
    again = build(Kind(distributed=True), record=RunRecord.read(f"{folder}/beside", 1))
    load_checkpoint(again, f"{folder}/beside", 1)
    return drawn == draw(), losses == [train(again, 1)], failed


def fail_beside(model, saver, folder, rank):
    """The message of a save that fails on one rank only, in its thread."""
    write = SaveTask.write

    def broken(self):
        if rank == 1:
            raise OSError(28, "No space left on device")
        write(self)

    SaveTask.write = broken
    save_checkpoint(model, f"{folder}/beside", 2, STATE, saver=saver)
    try:
        saver.finalize(blocking=True)
    except CheckpointSaveError as error:
        return str(error)
    finally:
        SaveTask.write = write
    return None


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    return folder, run_ranks(save_beside_training, 2, str(folder))


def test_a_save_beside_the_training_stores_what_was_there_at_its_start(beside):
    folder, _ = beside
    assert same(tensors(folder / "beside", 1), tensors(folder / "at_once"))
    assert not same(tensors(folder / "beside", 3), tensors(folder / "at_once"))
    assert CheckpointReader(folder / "beside", 1).meta["smoothing"].tolist() == [1, 1, 1]


def test_random_generators_and_losses_go_on_as_they_would_have(beside):
    assert all(numbers and losses for numbers, losses, _ in beside[1])


def test_a_save_that_fails_beside_the_training_is_raised_on_all_ranks(beside):
    folder, ranks = beside
    assert ranks[0][2] == ranks[1][2]
    assert "rank 1: No space left on device" in ranks[0][2]
    assert sorted(path.name for path in (folder / "beside").iterdir() if path.is_dir()) == [
        "iter_0000001",
        "iter_0000003",
    ]


def test_the_record_is_readable_without_a_model(beside):
    record = RunRecord.read(beside[0] / "at_once")
    assert record.iteration == 1
    assert record.state["lr_scheduler"] == STATE["lr_scheduler"]
    assert record.state["smoothing"]["head"].dtype == np.float32
    assert record.facts.mesh == (1, 1, 2)
    assert (record.path / "config.yaml").read_text() == STATE["config"]


def test_megatron_core_reads_the_folder_as_its_own(beside):
    from megatron.core import dist_checkpointing

    folder = str(beside[0] / "at_once" / "iter_0000001")
    assert dist_checkpointing.check_is_distributed_checkpoint(folder)
    metadata = dist_checkpointing.load_tensors_metadata(folder)
    reader = CheckpointReader(folder)
    assert {f"model/{name}" for name in reader.names} < set(metadata)
    assert dist_checkpointing.load_common_state_dict(folder)["state"]["tokens"] == STATE["tokens"]
