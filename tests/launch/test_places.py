"""Who a process is: each way of launching, from the variables that torchrun, users and Slurm set."""

import dataclasses
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.launch.assembly.watch import launchers
from megatron_prune.runtime.places import (
    Rank,
    Torchrun,
    find_place,
    find_rank,
    first_host,
    grace_seconds,
    rank_settings,
    speaks,
    stated_ranks,
)
from tests.strange import is_read_or_refused

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
    words = place.command("python", 4, ["job.sh", "run.yaml", "--stage", "prune"], logs=None)
    assert "--standalone" in words and "--nproc-per-node=4" in words
    assert words[-4:] == ["job.sh", "run.yaml", "--stage", "prune"]


def test_a_master_address_that_is_left_over_says_nothing():
    assert find_place({"MASTER_ADDR": "gpu0", "MASTER_PORT": "29500"}) == Torchrun(1, 0, None, None, None)
    assert find_rank({"MASTER_ADDR": "gpu0", "NNODES": "1"}) == Rank(0, 1, {})


POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


def test_a_pod_of_kubeflow_is_a_node():
    """WORLD_SIZE counts pods in older versions, ranks in newer ones; RANK counts pods."""
    assert find_place(POD) == Torchrun(2, 1, 1, "job-master-0", 23456)
    assert find_place(POD | {"NPROC_PER_NODE": "8"}) == Torchrun(2, 1, 8, "job-master-0", 23456)
    newer = POD | {"WORLD_SIZE": "16", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}
    assert find_place(newer) == find_place(newer | {"PET_NNODES": "2"}) == Torchrun(2, 1, 8, "job-master-0", 23456)
    assert find_place(POD | {"PET_NPROC_PER_NODE": "auto"}).nproc_per_node is None, "one per GPU"
    assert find_rank(POD) == Rank(1, 2, {"LOCAL_RANK": "0"})
    with pytest.raises(UserError, match="several ranks are asked for"):
        find_rank(newer)


def test_a_rank_finds_itself():
    assert find_rank({}) == Rank(0, 1, {})
    assert find_rank(PER_RANK) == find_place(PER_RANK)
    assert find_rank(PER_NODE | {"NPROC_PER_NODE": "1"}).world_size == 2
    given = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "fe80::1%eth0", "MASTER_PORT": "1"}
    assert find_rank(given | PER_NODE) == Rank(5, 16, {})
    by_hand = {name: value for name, value in given.items() if name != "LOCAL_RANK"}
    assert find_rank(PER_RANK | by_hand).environment == {"LOCAL_RANK": "3"}
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    place = find_rank(mpi | {"MASTER_ADDR": "gpu0", "MASTER_PORT": "29500"})
    assert (place.rank, place.world_size, place.environment["LOCAL_RANK"]) == (3, 4, "1")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "NNODES: several ranks"),
        ({"NPROC_PER_NODE": "8"}, "NPROC_PER_NODE: several ranks"),
        (PER_NODE | {"NPROC_PER_NODE": "8"}, "several ranks"),
        ({"SLURM_NNODES": "2"}, "srun"),
        ({"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "a:1"}, "PET_NNODES=1:4"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID"),
        (PER_RANK | {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but srun started 16"),
        (POD | {"RANK": "2"}, "RANK=2 is not below"),
        (POD | {"LOCAL_RANK": "0", "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (POD | {"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        (POD | {"LOCAL_RANK": "0", "MASTER_ADDR": "http://a"}, "MASTER_ADDR"),
        (POD | {"LOCAL_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR"),
        (POD | {"LOCAL_RANK": "0", "MASTER_PORT": "0"}, "MASTER_PORT"),
        (POD | {"LOCAL_RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT"),
        (POD | {"LOCAL_RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT"),
        (PER_RANK | {"MASTER_ADDR": "a b"}, "MASTER_ADDR"),
        ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK"),
    ],
)
def test_a_rank_refuses_what_would_make_it_the_only_one(environ, named):
    with pytest.raises(UserError, match=named) as caught:
        find_rank(environ)
    assert "\n" not in str(caught.value)


def test_several_nodes_from_the_usual_variables():
    usual = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "gpu0", "NPROC_PER_NODE": "8"}
    assert find_place(usual) == Torchrun(8, 3, 8, "gpu0", 29500)
    place = find_place(usual | {"MASTER_PORT": "1234"})
    words = place.command("python", 8, ["job.sh"], logs="logs")
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
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK is not set"),
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


_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NPROC_PER_NODE"),
    *("PET_NNODES", "PET_NPROC_PER_NODE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *(
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "SLURM_STEP_ID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
        "SLURM_NNODES",
    ),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"),
    *("SLURM_RESTART_COUNT", "GRACE_SECONDS", "MEGATRON_PRUNE_LAUNCHERS", "CUDA_VISIBLE_DEVICES"),
)
_WORDS = [
    "",
    " ",
    "0",
    "1",
    "2",
    "3",
    "16",
    "-1",
    "1.5",
    "1e3",
    "nan",
    "inf",
    "9" * 30,
    "\u00b2",
    "\uff11",
    "abc",
    "a\nb",
]
_WORDS += [
    "n[1-2]",
    "[",
    "n[",
    "x,y",
    "localhost",
    "::1",
    "\x1b[2J",
    "a;b;1:2",
    "a;1:\u00b2",
    "a b",
    "29500",
    "auto",
    "gpu",
]


@given(environ=st.dictionaries(st.sampled_from(_VARIABLES), st.sampled_from(_WORDS), max_size=8))
def test_any_variables_are_understood_or_refused_in_one_line(environ):
    for ask in (find_place, find_rank, grace_seconds, stated_ranks, speaks, launchers):
        is_read_or_refused(functools.partial(ask, environ))


def test_seconds_of_grace_are_seconds():
    assert grace_seconds({}) == 240 and grace_seconds({"GRACE_SECONDS": "1.5"}) == 1.5
    with pytest.raises(UserError, match="GRACE_SECONDS: expected a number of seconds"):
        grace_seconds({"GRACE_SECONDS": "5 minutes"})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1", "WORLD_SIZE": "two"}, False),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
        ({"RANK": "2"}, True),
        ({"RANK": "", "WORLD_SIZE": ""}, True),
        ({"RANK": " 0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, True),
        ({"NODE_RANK": "1", "NNODES": "2"}, False),
        ({"NODE_RANK": "1"}, True),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}, True),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "PMI_RANK": "0"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_a_number_that_is_none_of_the_job_s_is_told_by_who_has_it(environ: dict[str, str], expected: bool) -> None:
    assert speaks(environ) is expected
