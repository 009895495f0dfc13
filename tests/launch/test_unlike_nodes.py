"""Nodes that are not alike, and ranks that meet without torchrun: real processes that see different folders.

Each rank works in a folder of its own, and the command names its files relative to that: one command, and what the
nodes hold behind it differs.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from megatron_prune.config import Config
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.launch.assembly import alike, samples
from megatron_prune.launch.assembly.alike import Digests, difference
from megatron_prune.launch.assembly.samples import fingerprints
from megatron_prune.model.architecture import Group
from megatron_prune.runtime import rendezvous
from megatron_prune.testing.helpers.ranks import free_port, watch_ranks
from megatron_prune.testing.helpers.tiny_runs import TinyRun, prepare

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def nodes(tiny, tmp_path):
    """The same files twice; what is not under a node's folder is shared."""
    folders = [tmp_path / "node_0", tmp_path / "node_1"]
    for folder in folders:
        shutil.copytree(tiny.folder, folder)
    return folders


def rank_of_its_own(rank, _world_size, folders, words, variables, port):
    """A fresh rank, as srun starts it: no process group, `variables[rank]` instead of what torchrun sets."""
    from megatron_prune.pretrain import main
    from megatron_prune.runtime.failures import leave

    dist.barrier()  # else one leaves while the other still connects
    dist.destroy_process_group()
    for name in OF_LAUNCHERS:
        os.environ.pop(name, None)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | variables[rank]
    os.chdir(folders[rank])
    alike._PROBE_SECONDS = rendezvous._SECONDS_TO_ANSWER = 0.3
    try:
        leave(main([str(word) for word in (words[rank] if isinstance(words[0], list) else words)]))
    except SystemExit as ended:
        os._exit(ended.code)


def start(folders, words, variables=None):
    """How the ranks ended."""
    usual = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(len(folders))} for r in range(len(folders))]
    return watch_ranks(rank_of_its_own, len(folders), folders, words, variables or usual, free_port())


def command(save, *more):
    """A short run whose files are named relative to where it starts."""
    plain = ("--train-iters", 2, "--lr-warmup-iters", 0, "--prune-target-params", "null", "--continue-tokens", 0)
    return TinyRun(Path()).arguments(save, *plain, *more)


def told(fates):
    """The one line that was told, by rank 0; all ranks ended with 2 and without a traceback."""
    assert [fate.exit_code for fate in fates] == [2] * len(fates), [fate.output for fate in fates]
    lines = [line for fate in fates for line in fate.output.splitlines() if "rror" in line or "Traceback" in line]
    assert len(lines) == 1 and lines[0] in fates[0].output, lines
    return lines[0]


# Files that differ ----------------------------------------------------------------------------------------------------


def other_weights(node):
    path = node / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, path, {"format": "pt"})


def other_data(node):
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(node / f"data_1{suffix}", node / f"data_0{suffix}")


def other_ids(node):
    path = node / "data_1.bin"
    content = bytearray(path.read_bytes())
    content[2000:2010], content[2010:2020] = content[2010:2020], content[2000:2010]
    path.write_bytes(content)


def other_tokenizer(node):
    path = node / "tokenizer.model"
    model = SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(i).encode() for i in range(3, model.vocab_size())]
    (longest,) = sorted((piece for piece in pieces if piece.isascii()), key=len)[-1:]
    path.write_bytes(path.read_bytes().replace(longest, longest[::-1], 1))


def other_config(node):
    path = node / "source" / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": ', '"rope_theta": 1'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "model.hf_model (--hf-model): source/model.safetensors is "),
        (other_data, "data.data_path (--data-path): data_0.bin is "),
        (other_ids, "data.data_path (--data-path): data_1.bin is "),
        (other_tokenizer, "data.tokenizer_model (--tokenizer-model): content is "),
        (other_config, "model.hf_model (--hf-model): source/config.json is "),
    ],
)
def test_a_node_with_other_files_is_named_before_anything_is_written(nodes, tmp_path, change, words):
    change(nodes[1])
    line = told(start(nodes, command(tmp_path / "run")))
    assert line.startswith("error: " + words) and " on rank 1, and " in line and line.endswith("the same files"), line
    assert not (tmp_path / "run").exists()


def test_units_to_begin_with_that_differ_are_named(nodes, tmp_path):
    """As removals to repeat are, and a table of times."""
    whole = read_architecture(nodes[0] / "source")
    smaller = whole.without(Group.of("ffn", ((0,),) * whole.shape.num_layers))
    for node, architecture in zip(nodes, (whole, smaller)):
        (node / "first.json").write_text(json.dumps(architecture.to_json()))
    line = told(start(nodes, command(tmp_path / "run", "--architecture", "first.json")))
    assert line.startswith("error: model.architecture (--architecture): first.json is "), line
    config = Config()
    config = dataclasses.replace(
        config, pruning=dataclasses.replace(config.pruning, replay=str(nodes[0] / "first.json"))
    )
    (row,) = alike._named_files(config, begins=True)
    assert row.field == "pruning.replay (--prune-replay)" and len(row.parts) == 1


def test_files_that_one_node_lacks_are_named_with_the_rank(nodes, tmp_path):
    shutil.rmtree(nodes[1] / "source")
    line = told(start(nodes, command(tmp_path / "run")))
    assert "source" in line and "(on rank 1 only)" in line and not (tmp_path / "run").exists()


def test_copies_that_are_equal_train_and_leave_no_probe(nodes, tmp_path):
    """Each node has an index cache of its own, too. Of a checkpoint every file counts."""
    fates = start(nodes, command(tmp_path / "run", "--tensor-model-parallel-size", 2))
    assert [fate.exit_code for fate in fates] == [0, 0], [fate.output for fate in fates]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()
    assert not list((tmp_path / "run").glob(alike._PROBE + "*"))
    shutil.copytree(tmp_path / "run", nodes[1] / "old")
    shutil.copytree(tmp_path / "run", nodes[0] / "old")
    state = next((nodes[1] / "old").glob("iter_*")) / "run_state.json"
    state.write_text(state.read_text() + " ")
    line = told(start(nodes, [*command(tmp_path / "again"), "--load", "old", "--finetune"]))
    assert "old/iter_" in line and "run_state.json" in line, line


def test_a_save_folder_that_is_not_shared_is_refused_and_left_as_it_was(nodes):
    line = told(start(nodes, command("run")))
    assert line.startswith("error: checkpoint.save (--save): run is not the folder that rank 0 writes to"), line
    assert line.endswith("(on rank 1 only)") and not any((node / "run").exists() for node in nodes)


def test_a_mistake_of_one_rank_ends_all(nodes, tmp_path):
    """Before there is a process group, which the others would wait for."""
    words = [command(tmp_path / "run"), command(tmp_path / "run", "--seq-length", "long")]
    line = told(start(nodes, words))
    assert "--seq-length" in line and "(on rank 1 only)" in line


# Comparing ------------------------------------------------------------------------------------------------------------


def test_the_first_difference_is_told_and_a_new_input_is_one_more_row():
    ours = [Digests("source", {"a": "1", "b": "2"}), Digests("teacher", {"t": "5"})]
    assert difference([ours, list(ours), list(ours)]) is None
    other = [ours[0], Digests("teacher", {"t": "6"})]
    assert difference([ours, other, other]) == (
        "teacher: t is 6 on ranks 1, 2, and 5 on rank 0; give all nodes the same files"
    )
    assert "source: b is absent on rank 1" in difference([ours, [Digests("source", {"a": "1"}), ours[1]]])
    assert "source: c is 3 on rank 1, and absent on" in difference(
        [ours, [Digests("source", {**ours[0].parts, "c": "3"})]]
    )


@pytest.mark.parametrize("kind", ["safetensors", "plain"])
def test_of_a_large_file_every_matrix_is_sampled(tmp_path, monkeypatch, kind):
    """Reading is bounded; a matrix that is scaled is found wherever it lies."""
    monkeypatch.setattr(samples, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(samples, "_BLOCKS", 64)
    path, read = tmp_path / "large", []
    generator = torch.Generator().manual_seed(1)
    sizes = [8, 600_000, 16, 2000, 300_000]
    tensors = {f"w{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}

    def written():
        if kind == "safetensors":
            save_file(tensors, path)
        else:
            path.write_bytes(b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
        return fingerprints([path])[str(path)]

    pread = os.pread
    monkeypatch.setattr(samples.os, "pread", lambda *a: read.append(len(block := pread(*a))) or block)
    first = written()
    assert first.startswith(f"{path.stat().st_size} bytes") and sum(read) < path.stat().st_size / 4
    assert written() == first
    for name in tensors if kind == "safetensors" else ["w1", "w4"]:
        before, tensors[name] = tensors[name], tensors[name] * 1.5
        assert written() != first, name
        tensors[name] = before
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprints([path])[str(path)] != first


# Meeting --------------------------------------------------------------------------------------------------------------


def test_srun_with_a_task_per_rank_is_one_run(nodes, tmp_path):
    """Neither torchrun nor the script: pretrain reads Slurm's variables itself."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    step |= {"SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
    variables = [{**step, "SLURM_PROCID": str(r), "SLURM_LOCALID": "0", "SLURM_NODEID": str(r)} for r in range(2)]
    fates = start(nodes, command(tmp_path / "run"), variables)
    assert [fate.exit_code for fate in fates] == [0, 0], [fate.output for fate in fates]
    assert "2 ranks: TP 1 x PP 1 x DP 2" in fates[0].output and "iteration" not in fates[1].output
    assert (tmp_path / "run" / "run_status.json").exists()


def alone(tiny, tmp_path, variables, *more):
    """One process, which is told so much."""
    words = tiny.arguments(tmp_path / "run", "--distributed-timeout-minutes", 0.05, *more)
    (fate,) = watch_ranks(rank_of_its_own, 1, [tmp_path], words, [variables], free_port(), timeout=30)
    assert fate.exit_code == 2 and "Traceback" not in fate.output, fate.output
    (line,) = (line for line in fate.output.splitlines() if line.startswith("error: "))
    assert not (tmp_path / "run").exists()
    return line


def test_half_set_variables_are_refused(tiny, tmp_path):
    assert "WORLD_SIZE is not set, though RANK is" in alone(tiny, tmp_path, {"RANK": "0", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(("rank", "words"), [(0, "is taken by another program"), (1, "what answers there is another")])
def test_a_port_that_belongs_to_another_program_is_the_users_mistake(tiny, tmp_path, rank, words):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(other.getsockname()[1])}
        line = alone(tiny, tmp_path, place)
    assert "MASTER_PORT" in line and words in line and place["MASTER_PORT"] in line, line


def test_hosts_that_nobody_knows_and_ranks_that_never_come_are_told_in_time(tiny, tmp_path):
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    line = alone(tiny, tmp_path, place | {"MASTER_ADDR": "nohost.invalid"})
    assert line.startswith("error: MASTER_ADDR: nohost.invalid is no host that is known here"), line
    line = alone(tiny, tmp_path, place)
    assert "rank 1 could not meet the other 1 ranks at 127.0.0.1:" in line and "within 0.05 minutes" in line, line
