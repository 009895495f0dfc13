"""Who a process is: each way of launching, from the variables that torchrun, users and Slurm set."""

import dataclasses

import pytest

from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.launch.places import Rank, Torchrun, find_place, first_host, rank_settings

STEP = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NODEID": "1",
}
PER_NODE = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
PER_RANK = STEP | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}


def test_alone_is_one_node_with_a_port_of_its_own():
    place = find_place({})
    assert place == Torchrun(1, 0, None, None, None)
    words = place.command("python", 4, "job.sh", ["run.yaml", "--stage", "prune"], logs=None)
    assert "--standalone" in words and "--nproc-per-node=4" in words
    assert words[-4:] == ["job.sh", "run.yaml", "--stage", "prune"]


def test_several_nodes_from_the_usual_variables():
    usual = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "gpu0", "NPROC_PER_NODE": "8"}
    assert find_place(usual) == Torchrun(8, 3, 8, "gpu0", 29500)
    place = find_place(usual | {"MASTER_PORT": "1234"})
    words = place.command("python", 8, "job.sh", [], logs="logs")
    assert {"--nnodes=8", "--node-rank=3", "--master-addr=gpu0", "--master-port=1234", "--log-dir=logs"} <= set(words)


def test_slurm_with_one_task_per_node_starts_torchrun():
    place = find_place(PER_NODE | {"NPROC_PER_NODE": "8"})
    assert dataclasses.replace(place, master_port=None) == Torchrun(2, 1, 8, "gpu03", None)
    other = find_place(PER_NODE | {"NPROC_PER_NODE": "8", "SLURM_NODEID": "0"})
    assert other.master_port == place.master_port, "nodes of a job meet at one port"
    neighbour = find_place(PER_NODE | {"NPROC_PER_NODE": "8", "SLURM_JOB_ID": "72"})
    assert neighbour.master_port != place.master_port, "two jobs on a node do not"


def test_slurm_with_one_task_per_rank_is_that_rank():
    place = find_place(PER_RANK)
    assert (place.rank, place.world_size) == (11, 16)
    assert place.environment["RANK"] == "11" and place.environment["WORLD_SIZE"] == "16"
    assert place.environment["LOCAL_RANK"] == "3" and place.environment["MASTER_ADDR"] == "gpu03"
    assert 1024 < int(place.environment["MASTER_PORT"]) < 32768, "not where kernels take ephemeral ports from"


def test_a_task_that_sees_one_gpu_uses_that_one():
    assert find_place(PER_RANK | {"CUDA_VISIBLE_DEVICES": "3"}).environment["LOCAL_RANK"] == "0"
    assert find_place(PER_RANK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).environment["LOCAL_RANK"] == "3"


def test_torchruns_ranks_are_taken_as_they_are_even_within_slurm():
    given = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu0", "MASTER_PORT": "1"}
    assert find_place(PER_NODE | given | {"NPROC_PER_NODE": "4"}) == Rank(5, 16, {})


def test_one_interactive_task_is_a_node_of_its_own():
    assert find_place(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}).nnodes == 1


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"NNODES": "2"}, "NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2"),
        ({"NNODES": "two"}, "NNODES"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE"),
        ({"RANK": "0"}, "LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"SLURM_NNODES": "2"}, "srun"),
        (PER_RANK | {"NPROC_PER_NODE": "8"}, "--ntasks-per-node=1"),
        ({k: v for k, v in PER_RANK.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID"),
    ],
)
def test_what_is_missing_is_named(environ, named):
    with pytest.raises(UserError, match=named) as caught:
        find_place(environ)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-05,9]-ib,login", "gpu03-ib"),
        ("a-1,b[1-2]", "a-1"),
        ("r[7,9]c[01-04]", "r7c01"),
    ],
)
def test_first_host_of_a_nodelist(nodelist, host):
    assert first_host(nodelist) == host


def test_settings_matter_only_where_they_do():
    def config(**parallel):
        return dataclasses.replace(Config(), parallel=dataclasses.replace(Config().parallel, **parallel))

    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_settings(config(), {})
    assert rank_settings(config(tensor_model_parallel_size=2), {})["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_settings(config(tensor_model_parallel_size=2, device="cpu"), {})
    user = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rank_settings(config(tensor_model_parallel_size=2), user)
