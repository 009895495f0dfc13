"""Where this process stands in a job, from its environment: pure decisions, nothing is started here.

    find_place       environment -> Torchrun (start the ranks of this node) or Rank (be one)
    find_rank        the same for `pretrain`, which is one rank and starts no others
    search_path      PYTHONPATH for processes that are started here
    speaks           whether this process is the one that tells people
    first_host       `n[1-2,7],gpu03` -> `n1`, for MASTER_ADDR without asking the scheduler
    rank_settings    environment variables that matter to a rank, with their reasons
    grace_seconds    how long ranks that are told to leave may take
    stated_ranks     how many ranks a launcher says there are

Ways that lead here:

    torchrun SCRIPT                       RANK, WORLD_SIZE, LOCAL_RANK are set: a rank
    bash SCRIPT                           NNODES NODE_RANK MASTER_ADDR MASTER_PORT NPROC_PER_NODE; one node needs none
    srun, one task per node               the same from SLURM_*; NPROC_PER_NODE says that torchrun starts the ranks
    srun, one task per rank (per GPU)     SLURM_PROCID, SLURM_LOCALID, ... become RANK, LOCAL_RANK, ...
    Kubeflow's PyTorchJob                 RANK, WORLD_SIZE without LOCAL_RANK (and PET_NPROC_PER_NODE): a pod is a node
    mpirun, one process per rank          OMPI_COMM_WORLD_RANK, ... or PMI_RANK, ..., with MASTER_ADDR and MASTER_PORT

A variable that is set in half, or says something else than another one, is refused: a process that took itself for the
only rank would write the same folder as the others.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_prune
from megatron_prune.config import Config
from megatron_prune.errors import UserError

DEFAULT_PORT = 29500
# Ports derived from a job's number lie below those that kernels hand out (32768 and up).
_FIRST_PORT, _PORTS, _LAST_PORT = 15000, 16000, 65535
_ADDRESS = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*)|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?")  # or IPv6
# mpirun's names of RANK, WORLD_SIZE and LOCAL_RANK; srun sets PMI's as well, where Slurm's own come first.
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")

# What numbers a process, and what says how many there are.
_NUMBERED = {
    "RANK": ("WORLD_SIZE",),
    _OPEN_MPI[0]: _OPEN_MPI[1:2],
    "NODE_RANK": ("NNODES",),
    "SLURM_PROCID": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    _PMI[0]: _PMI[1:2],
}


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

    def command(
        self, python: str, nproc: int, program: Sequence[str], logs: str | None, minutes: float = 10
    ) -> list[str]:
        """The torchrun command line.

        Args:
            nproc: ranks on this node. program: what each of them runs: a script, or -m and a module; its arguments.
            logs: folder for one file per rank and stream; the node's first rank is then shown, too. None: all on the
                terminal.
            minutes: how long nodes may be late.
        """
        words = [python, "-m", "megatron_prune.launch.jobs.elastic", f"--nproc-per-node={nproc}"]
        if self.master_addr is None:
            words += ["--standalone"]
        else:
            words += [
                f"--nnodes={self.nnodes}",
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.master_addr}",
                f"--master-port={self.master_port}",
                f"--rdzv-conf=timeout={max(int(60 * minutes), 1)}",
            ]
        if logs is not None:
            words += [f"--log-dir={logs}", "--redirects=3", "--tee=0:3"]
        # The others are the supervisor's to deliver (see there why); a handler for SIGHUP would undo nohup.
        return [*words, "--signals-to-handle=SIGQUIT", *program]


@dataclass(frozen=True)
class Rank:
    """This process is a rank; `environment` is what torch.distributed expects to find set."""

    rank: int
    world_size: int
    environment: dict[str, str]


def find_place(environ: Mapping[str, str]) -> Torchrun | Rank:
    """Decide what this process is. Raises UserError: variables are missing or contradict each other; the message names
    them."""
    if _is_pod(environ):
        return _pod(environ)
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return _given_rank(environ)
    if _number(environ, _OPEN_MPI[1], 1) > 1:
        return _mpi_rank(environ, _OPEN_MPI)
    if "SLURM_STEP_ID" in environ:
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
        if "NPROC_PER_NODE" in environ:
            return _slurm_node(environ, tasks)
        if tasks > 1:
            return _slurm_rank(environ, tasks)
    elif _number(environ, _PMI[1], 1) > 1:
        return _mpi_rank(environ, _PMI)
    elif _number(environ, "SLURM_NNODES", 1) > 1 and "NNODES" not in environ:
        raise UserError(
            f"SLURM_NNODES: this job has {environ['SLURM_NNODES']} nodes, and this process runs on one of them only; "
            "start the script by srun, one task per node (with NPROC_PER_NODE set) or one per rank"
        )
    return _plain_node(environ)


def find_rank(environ: Mapping[str, str]) -> Rank:
    """Which rank this process is, where nothing starts further ones. Raises UserError: as `find_place`, or the
    variables ask for several ranks that nobody has started."""
    if _is_pod(environ) and _pod(environ).nproc_per_node == 1:
        return dataclasses.replace(_given_rank({**environ, "LOCAL_RANK": "0"}), environment={"LOCAL_RANK": "0"})
    started = {name: value for name, value in environ.items() if (name, value) != ("NPROC_PER_NODE", "1")}
    place = find_place(started)
    if isinstance(place, Rank):
        return place
    if place.nnodes > 1 or (place.nproc_per_node or 1) > 1:
        name = "NPROC_PER_NODE" if place.nnodes == 1 else "NNODES" if "NNODES" in environ else "WORLD_SIZE"
        wanted = f"{place.nnodes} nodes, {place.nproc_per_node or 1} on each"
        raise UserError(
            f"{name}: several ranks are asked for ({wanted}), and this "
            "command is one of them; let torchrun or megatron-prune launch start it, or srun one per rank"
        )
    return Rank(0, 1, {})


def search_path(environ: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH for processes that this one starts, so that they find the package that this one runs."""
    root = Path(megatron_prune.__file__).resolve().parents[1]
    if root.name in ("site-packages", "dist-packages"):  # found anyway, and not to come before the standard library
        return environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, [str(root), environ.get("PYTHONPATH")]))


def speaks(environ: Mapping[str, str]) -> bool:
    """Whether this process is the one that tells people: rank 0, or node 0, or one whose number is none of the
    job's: nobody else would say so.
    """
    for name, counts in _NUMBERED.items():
        if name in environ:
            number = environ[name]
            count = next((environ[one] for one in counts if one in environ), "1")
            if not _is_number(number) or int(number) == 0:
                return True
            return _is_number(count) and int(number) >= int(count)
    return True


def _is_pod(environ: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE are there as Kubeflow sets them: no local rank, nor a launcher that knows it."""
    others = {"LOCAL_RANK", "SLURM_LOCALID", _OPEN_MPI[2], _PMI[2]}
    return {"RANK", "WORLD_SIZE"} <= set(environ) and not others & set(environ)


def _pod(environ: Mapping[str, str]) -> Torchrun:
    """RANK counts pods. WORLD_SIZE counts ranks where PET_NPROC_PER_NODE is a number, else pods."""
    per_pod = environ.get("PET_NPROC_PER_NODE", "")
    pods, world_size = environ.get("PET_NNODES", ""), _number(environ, "WORLD_SIZE")
    counted = _number(environ, "PET_NPROC_PER_NODE") if per_pod.isdecimal() else 1
    nnodes = int(pods) if pods.isdecimal() and int(pods) else max(world_size // counted, 1)
    nproc = _optional(environ, "NPROC_PER_NODE") or (None if per_pod in ("auto", "gpu") else counted)
    rank = _number(environ, "RANK")
    if rank >= nnodes:
        raise UserError(
            f"RANK={rank} is not below the number of pods, {nnodes} (from WORLD_SIZE={world_size}); LOCAL_RANK is not "
            "set, so RANK is taken for the pod's number, as Kubeflow sets it: set LOCAL_RANK if this process is a rank"
        )
    if nnodes == 1:
        return Torchrun(1, 0, nproc, None, None)
    return Torchrun(nnodes, rank, nproc, *_master(environ, "WORLD_SIZE"))


def _given_rank(environ: Mapping[str, str]) -> Rank:
    given = "RANK" if "RANK" in environ else "LOCAL_RANK"
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in environ]
    local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID", _OPEN_MPI[2], _PMI[2]) if name in environ), None)
    if missing or local is None:
        name = missing[0] if missing else "LOCAL_RANK"
        raise UserError(f"{name} is not set, though {given} is; start the script by torchrun, bash or srun")
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _number(environ, local)
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; ranks count from 0")
    if world_size > 1:
        _master(environ, given)
    return Rank(rank, world_size, {} if local == "LOCAL_RANK" else {"LOCAL_RANK": environ[local]})


def _mpi_rank(environ: Mapping[str, str], names: tuple[str, str, str]) -> Rank:
    """A process that mpirun started; MASTER_ADDR and MASTER_PORT say where its rank 0 is."""
    rank, world_size, local = (_number(environ, name) for name in names)
    _master(environ, names[1])
    return Rank(rank, world_size, {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local)})


def _master(environ: Mapping[str, str], needed_by: str) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, both of which must be there and mean something."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            value = environ.get(needed_by, "")
            raise UserError(
                f"{name} is not set, and {needed_by}={value} needs it; set MASTER_ADDR and MASTER_PORT to rank 0's "
                "host and a free port there, the same for all, or start the script by torchrun, bash or srun"
            )
    return _address(environ["MASTER_ADDR"]), _port(environ)


def _address(text: str) -> str:
    if not _ADDRESS.fullmatch(text):
        raise UserError(f'MASTER_ADDR: expected the name or address of rank 0\'s host, got "{text}"')
    return text


def _port(environ: Mapping[str, str], default: int | None = None) -> int:
    port = _number(environ, "MASTER_PORT", default)
    if not 0 < port <= _LAST_PORT:
        raise UserError(f"MASTER_PORT: expected a port from 1 to {_LAST_PORT}, got {environ['MASTER_PORT']}")
    return port


def _plain_node(environ: Mapping[str, str]) -> Torchrun:
    if _number(environ, "WORLD_SIZE", 1) > 1:
        raise UserError(
            f"RANK is not set, though WORLD_SIZE={environ['WORLD_SIZE']} is; set RANK, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT as well, or start the script by torchrun, bash or srun"
        )
    nnodes, nproc = _number(environ, "NNODES", 1), _optional(environ, "NPROC_PER_NODE")
    if "NNODES" not in environ and environ.get("PET_NNODES", "1") != "1":
        raise UserError(
            f"PET_NNODES={environ['PET_NNODES']} asks for several nodes, and RANK and WORLD_SIZE are not set; start "
            "the script by torchrun, which reads the PET_ variables, or set NNODES, NODE_RANK and MASTER_ADDR"
        )
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in environ]
    if nnodes > 1 and missing:
        raise UserError(
            f"{missing[0]} is not set, and NNODES={nnodes} needs it; set {' and '.join(missing)} on each node"
        )
    node_rank = _number(environ, "NODE_RANK", 0)
    if node_rank >= nnodes:
        total = f"NNODES={nnodes}" if "NNODES" in environ else "1, the number of nodes while NNODES is not set"
        raise UserError(f"NODE_RANK={node_rank} is not below {total}; nodes count from 0")
    if nnodes == 1:  # a MASTER_ADDR that is left over from something else says nothing
        return Torchrun(1, 0, nproc, None, None)
    return Torchrun(nnodes, node_rank, nproc, _address(environ["MASTER_ADDR"]), _port(environ, DEFAULT_PORT))


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
    if _number(environ, "WORLD_SIZE", tasks) != tasks:
        raise UserError(f"WORLD_SIZE={environ['WORLD_SIZE']}, but srun started {tasks} tasks; unset it")
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
    turn += 101 * _number(environ, "SLURM_STEP_ID", 0)  # two steps of a job may run side by side
    return _address(address), _port(environ, _FIRST_PORT + turn % _PORTS)


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


def grace_seconds(environ: Mapping[str, str]) -> float:
    """GRACE_SECONDS, 240 unless set. Raises UserError: it is no such number."""
    text = environ.get("GRACE_SECONDS", "240")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise UserError(f'GRACE_SECONDS: expected a number of seconds, got "{text}"')
    return float(text)


def stated_ranks(environ: Mapping[str, str]) -> int:
    """WORLD_SIZE, 1 unless set. Raises UserError: it is no such number."""
    return max(_number(environ, "WORLD_SIZE", 1), 1)


def _optional(environ: Mapping[str, str], name: str) -> int | None:
    return _number(environ, name) if name in environ else None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise UserError(f"{name} is not set; start the script by torchrun, bash or srun")
        return default
    if not _is_number(text) or (name.startswith(("NNODES", "NPROC", "PET_NPROC")) and int(text) == 0):
        raise UserError(f'{name}: expected a whole number, got "{text}"')
    return int(text)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text) is not None
