"""Where this process stands in a job, from its environment: pure decisions, nothing is started here.

    find_place       environment -> Torchrun (start the ranks of this node) or Rank (be one)
    first_host       `n[1-2,7],gpu03` -> `n1`, for MASTER_ADDR without asking the scheduler
    rank_settings    environment variables that matter to a rank, with their reasons

Four ways lead here:

    torchrun SCRIPT                       RANK, WORLD_SIZE, LOCAL_RANK are set: a rank
    bash SCRIPT                           NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE; one node needs none
    srun, one task per node               the same from SLURM_*; NPROC_PER_NODE says that torchrun starts the ranks
    srun, one task per rank (per GPU)     SLURM_PROCID, SLURM_LOCALID, ... become RANK, LOCAL_RANK, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prune.config import Config
from megatron_prune.errors import UserError

DEFAULT_PORT = 29500
# Ports derived from a job's number lie below those that kernels hand out (32768 and up).
_FIRST_PORT, _PORTS = 15000, 16000


@dataclass(frozen=True)
class Torchrun:
    """This process starts torchrun for its node.

    Args:
        nproc_per_node: ranks to start, or None: one per visible GPU, one without.
        master_addr, master_port: where rank 0's node listens; None on a single node: torchrun finds a free port.
    """

    nnodes: int
    node_rank: int
    nproc_per_node: int | None
    master_addr: str | None
    master_port: int | None

    def command(self, python: str, nproc: int, script: str, arguments: list[str], logs: str | None) -> list[str]:
        """The torchrun command line.

        Args:
            nproc: ranks on this node.
            logs: folder for one file per rank and stream; the node's first rank is then shown, too. None: all on the
                terminal.
        """
        words = [python, "-m", "megatron_prune.launch.elastic", f"--nproc-per-node={nproc}"]
        if self.master_addr is None:
            words += ["--standalone"]
        else:
            words += [
                f"--nnodes={self.nnodes}",
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.master_addr}",
                f"--master-port={self.master_port}",
            ]
        if logs is not None:
            words += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]
        # The others are the supervisor's to deliver (see there why); a handler for SIGHUP would undo nohup.
        return [*words, "--signals-to-handle=SIGQUIT", script, *arguments]


@dataclass(frozen=True)
class Rank:
    """This process is a rank; `environment` is what torch.distributed expects to find set."""

    rank: int
    world_size: int
    environment: dict[str, str]


def find_place(environ: Mapping[str, str]) -> Torchrun | Rank:
    """Decide what this process is.

    Raises:
        UserError: variables are missing or contradict each other; the message names them.
    """
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return _given_rank(environ)
    if "SLURM_STEP_ID" in environ:
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
        if "NPROC_PER_NODE" in environ:
            return _slurm_node(environ, tasks)
        if tasks > 1:
            return _slurm_rank(environ, tasks)
    elif _number(environ, "SLURM_NNODES", 1) > 1 and "NNODES" not in environ:
        raise UserError(
            f"SLURM_NNODES: this job has {environ['SLURM_NNODES']} nodes, and this process runs on one of them only; "
            "start the script by srun, one task per node (with NPROC_PER_NODE set) or one per rank"
        )
    return _plain_node(environ)


def _given_rank(environ: Mapping[str, str]) -> Rank:
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in environ]
    if not missing and _number(environ, "WORLD_SIZE") > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing:
        given = "RANK" if "RANK" in environ else "LOCAL_RANK"
        raise UserError(f"{missing[0]} is not set, though {given} is; start the script by torchrun, bash or srun")
    return Rank(_number(environ, "RANK"), _number(environ, "WORLD_SIZE"), {})


def _plain_node(environ: Mapping[str, str]) -> Torchrun:
    nnodes, nproc = _number(environ, "NNODES", 1), _optional(environ, "NPROC_PER_NODE")
    if nnodes == 1 and "MASTER_ADDR" not in environ:
        return Torchrun(1, 0, nproc, None, None)
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environ]
    if nnodes > 1 and missing:
        raise UserError(
            f"{missing[0]} is not set, and NNODES={nnodes} needs it; set {' and '.join(missing)} on each node"
        )
    node_rank = _number(environ, "NODE_RANK", 0)
    if node_rank >= nnodes:
        raise UserError(f"NODE_RANK={node_rank} is not below NNODES={nnodes}; nodes count from 0")
    return Torchrun(nnodes, node_rank, nproc, environ["MASTER_ADDR"], _number(environ, "MASTER_PORT", DEFAULT_PORT))


def _slurm_node(environ: Mapping[str, str], tasks: int) -> Torchrun:
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    if tasks != nodes:
        raise UserError(
            f"NPROC_PER_NODE is set, so torchrun starts the ranks, but srun started {tasks} tasks on {nodes} nodes; "
            "use --ntasks-per-node=1, or unset NPROC_PER_NODE to make each task a rank"
        )
    nproc = _number(environ, "NPROC_PER_NODE")
    if nodes == 1:
        return Torchrun(1, 0, nproc, None, None)
    return Torchrun(nodes, _number(environ, "SLURM_NODEID"), nproc, *_slurm_master(environ))


def _slurm_rank(environ: Mapping[str, str], tasks: int) -> Rank:
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    address, port = _slurm_master(environ)
    visible = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return Rank(
        rank,
        tasks,
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(tasks),
            # With --gpus-per-task each task sees its own GPU only, as number 0.
            "LOCAL_RANK": "0" if len(visible) == 1 else str(local_rank),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        },
    )


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0: the step's first host, and a port that follows from the job's number."""
    address = environ.get("MASTER_ADDR")
    if address is None:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UserError(
                "SLURM_STEP_NODELIST is not set, and neither is MASTER_ADDR; set the latter to rank 0's host"
            )
        address = first_host(nodes)
    turn = 13 * _number(environ, "SLURM_JOB_ID", 0) + _number(environ, "SLURM_RESTART_COUNT", 0)
    return address, _number(environ, "MASTER_PORT", _FIRST_PORT + turn % _PORTS)


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[03-05,9]-ib,login` -> `gpu03-ib`."""
    match = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", nodelist)
    first = match[0] if match else nodelist
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def rank_settings(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a rank, to be set before torch starts CUDA; what the user has set stays."""
    wanted = {
        # Data loading is not where tokenizers run, and their threads warn at every fork.
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.parallel.device != "cpu":
        # Compactions replace large buffers by slightly smaller ones: without growing segments that fragments memory.
        wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        if config.parallel.tensor_model_parallel_size > 1:
            # One hardware queue: tensor-parallel collectives start in the order they were issued, before the
            # computation that hides them. Other layouts are left alone: it may cost overlap there.
            wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return {name: value for name, value in wanted.items() if name not in environ}


def _optional(environ: Mapping[str, str], name: str) -> int | None:
    return _number(environ, name) if name in environ else None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise UserError(f"{name} is not set; start the script by torchrun, bash or srun")
        return default
    if not re.fullmatch(r"\d{1,9}", text) or (name.startswith(("NNODES", "NPROC")) and int(text) == 0):
        raise UserError(f'{name}: expected a whole number, got "{text}"')
    return int(text)
