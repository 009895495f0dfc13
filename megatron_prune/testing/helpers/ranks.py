"""Run a function on N gloo ranks on the CPU of this machine, as tests of distributed code need it.

    run_ranks    call function(rank, world_size, *args) on every rank, with torch.distributed initialised; results back
    RankError    a rank raised, died or did not finish; names the rank and carries its traceback and output
    watch_ranks  the same for ranks that are meant to die: how each ended, and when
    free_port    for processes that a caller starts itself

Ranks are forked from a server process that has imported torch and megatron-core once (seconds), so that one call takes
a fraction of a second. They meet through a file in a temporary folder: no port is chosen. Each rank leads its own
process group and ends with the caller, so nothing outlives a call, whatever the function starts or wherever it hangs.
CUDA is hidden from the ranks.

What a rank prints is printed again by the caller, rank by rank, once the call is over (pytest then shows it with the
test that failed).
"""

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from megatron_prune.runtime.places import search_path

ROOT = Path(__file__).resolve().parents[3]  # of the repository, where the package lies in one
PRELOADED = ("megatron_prune.testing.helpers.warm",)
PRELOADED_IF_USED = ("pytest", "hypothesis")  # a rank imports the test module, and with it these
_RANK_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_SECONDS_TO_EXIT = 5.0  # for a rank that has sent its result
_LINES_OF_OUTPUT = 40  # of a failed rank, shown in the error


class RankError(RuntimeError):
    """A rank failed. `rank` is the first that did, `exception` what it raised (None when it died or hung)."""

    def __init__(self, message: str, rank: int, exception: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.exception = exception


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` processes joined in a gloo process group.

    Args:
        function: defined at the top level of an importable module (a test module is one); what it returns is pickled.
        world_size: number of ranks; each computes with one thread.
        args: picklable; every rank gets its own copy.
        timeout: seconds for the whole call (the first one in a process also starts the server, on top of it).

    Returns:
        Each rank's return value, in rank order.

    Raises:
        RankError: the first rank that raised or died (the others are killed), or the ranks that did not finish in
            time, with where they stand. `__cause__` is the rank's own exception where it can be pickled.
        TypeError: function or arguments cannot be pickled.
    """
    try:
        call = pickle.dumps((function, args))
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(f"run_ranks: function (top level of a module) and arguments must pickle: {error}") from error
    with _started(call, world_size, timeout, shows=True) as ranks:
        return _collect(ranks, time.monotonic() + timeout, timeout)


@dataclass(frozen=True)
class Fate:
    """How a rank ended.

    Args:
        exit_code: of its process (negative: the signal that ended it); None: it did not end by itself, and was killed.
        seconds: from the call until its end.
        output: what it printed.
    """

    exit_code: int | None
    seconds: float
    output: str


def watch_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0, grace: float = 30.0
) -> list[Fate]:
    """As `run_ranks`, for a function under which ranks die: waits until every rank has ended, however it does.

    What the function returns is dropped; for an exit code of its own it calls `os._exit`. As under torchrun, ranks that
    go on for `grace` seconds after another has died are killed.
    """
    ends = dict[int, float]()
    with _started(pickle.dumps((function, args)), world_size, timeout) as ranks:
        begin = time.monotonic()
        deadline = begin + timeout
        while len(ends) < world_size and time.monotonic() < deadline:
            alive = {rank.process.sentinel: rank for rank in ranks if rank.rank not in ends}
            for sign in connection.wait(list(alive), deadline - time.monotonic()):
                rank = alive[sign]
                ends[rank.rank] = time.monotonic() - begin
                if rank.process.exitcode < 0:
                    deadline = min(deadline, time.monotonic() + grace)
        codes = [rank.process.exitcode if rank.rank in ends else None for rank in ranks]
        return [
            Fate(code, ends.get(rank.rank, deadline - begin), rank.output())
            for rank, code in zip(ranks, codes, strict=True)
        ]


@contextlib.contextmanager
def _started(call: bytes, world_size: int, timeout: float, shows: bool = False) -> Iterator[list["_RankProcess"]]:
    """Ranks that run the pickled `call`; at the end they are killed, what they printed is printed again where that is
    asked for, and their folder goes."""
    folder, ranks = Path(tempfile.mkdtemp(prefix="run_ranks_")), list[_RankProcess]()
    try:
        context = _context()
        for number in range(world_size):
            ranks.append(_RankProcess(context, number, world_size, folder, call, timeout))
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks if shows else ():
            sys.stdout.write(rank.output())
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context() -> Any:
    """The forkserver's context; its server starts with the first call, and again should it have died."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *(name for name in PRELOADED_IF_USED if name in sys.modules)])
    with _environment(_RANK_ENVIRONMENT | {"PYTHONPATH": search_path()}):
        forkserver.ensure_running()
    _wait_for_server()
    return context


@functools.cache
def _wait_for_server() -> None:
    """The first call waits here for the server's imports, which count towards nobody's timeout."""
    process = multiprocessing.get_context("forkserver").Process(target=time.time)
    process.start()
    process.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _RankProcess:
    """The caller's side of one rank: its process, the pipe its result comes through, its output."""

    def __init__(self, context: Any, rank: int, world_size: int, folder: Path, call: bytes, timeout: float) -> None:
        self.rank = rank
        self.result: bytes | None = None
        self.log = folder / f"rank_{rank}.log"
        self.pipe, theirs = context.Pipe(duplex=False)
        environment = dict(os.environ) | _RANK_ENVIRONMENT
        arguments = (rank, world_size, str(folder), environment, call, theirs, timeout)
        self.process = context.Process(target=_rank_main, args=arguments, name=f"rank_{rank}")
        self.process.start()
        theirs.close()

    def receive(self) -> tuple[str, float, bytes] | None:
        """What the rank sent: (`ok` or `error`, time, pickled content); None when it died without a word."""
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except EOFError:
            return None

    def output(self) -> str:
        """Everything the rank printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to the rank and whatever it started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the rank and whatever it started, and give back what the caller holds for it."""
        self.process.join(_SECONDS_TO_EXIT if self.result is not None else 0)
        self.signal(signal.SIGKILL)
        self.process.kill()  # should it not lead a group of its own yet
        self.process.join()
        self.process.close()
        self.pipe.close()


def _collect(ranks: list[_RankProcess], deadline: float, timeout: float) -> list[Any]:
    """Wait for all results; raise for the first failure."""
    waiting = list(ranks)
    while waiting:
        # A dead rank's pipe may be held open by what it started; its sentinel is not.
        signs = {sign: rank for rank in waiting for sign in (rank.pipe, rank.process.sentinel)}
        ready = {signs[sign] for sign in connection.wait(list(signs), max(0.0, deadline - time.monotonic()))}
        if not ready:
            raise _not_finished(waiting, len(ranks), timeout)
        failures = []
        for rank in ready:
            message = rank.receive()
            if message is None or message[0] == "error":
                failures.append((message[1] if message else time.monotonic(), rank, message))
            else:
                rank.result = message[2]
        waiting = [rank for rank in waiting if rank.result is None]
        if failures:
            _, rank, message = min(failures, key=lambda failure: failure[0])
            raise _failed(rank, len(ranks), message)
    return [pickle.loads(rank.result) for rank in ranks if rank.result is not None]


def _failed(rank: _RankProcess, world_size: int, message: tuple[str, float, bytes] | None) -> RankError:
    if message is None:
        rank.process.join(_SECONDS_TO_EXIT)
        died = f"rank {rank.rank} of {world_size} died with exit code {rank.process.exitcode}\n"
        return RankError(died + _tail(rank), rank.rank)
    text, pickled = pickle.loads(message[2])
    exception = pickle.loads(pickled) if pickled else None
    error = RankError(f"rank {rank.rank} of {world_size} raised\n{text}{_tail(rank)}", rank.rank, exception)
    error.__cause__ = exception
    return error


def _not_finished(ranks: list[_RankProcess], world_size: int, timeout: float) -> RankError:
    """Let the ranks that hang write down where they stand (faulthandler, on SIGABRT), then say so."""
    for rank in ranks:
        rank.signal(signal.SIGABRT)
    for rank in ranks:
        rank.process.join(_SECONDS_TO_EXIT)
    names = ", ".join(str(rank.rank) for rank in ranks)
    stacks = "".join(f"\nrank {rank.rank}:\n{_tail(rank)}" for rank in ranks)
    return RankError(f"ranks {names} of {world_size} did not finish within {timeout:g} s{stacks}", ranks[0].rank)


def _tail(rank: _RankProcess) -> str:
    lines = rank.output().splitlines()[-_LINES_OF_OUTPUT:]
    return "".join(f"  | {line}\n" for line in lines)


# The rank's own side --------------------------------------------------------------------------------------------------


def _rank_main(
    rank: int, world_size: int, folder: str, environment: dict[str, str], call: bytes, pipe: Any, timeout: float
) -> None:
    """Body of a rank's process: join the group, call the function, send what came of it."""
    _isolate(rank, world_size, folder, environment)
    try:
        message = "ok", time.monotonic(), _call(rank, world_size, folder, call, timeout)
    except BaseException as error:
        message = "error", time.monotonic(), pickle.dumps((traceback.format_exc(), _pickled(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(message)
    pipe.close()


def _isolate(rank: int, world_size: int, folder: str, environment: dict[str, str]) -> None:
    """Make this process a rank: own process group, own output file, the caller's environment and torchrun's names."""
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_the_caller, args=(folder,), daemon=True).start()
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(os.path.join(folder, f"rank_{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )


def _end_with_the_caller(folder: str) -> None:
    """Should the caller die, which can then clean up no more: take everything along that this rank started."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    connection.wait([caller.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _call(rank: int, world_size: int, folder: str, call: bytes, timeout: float) -> bytes:
    """Initialise torch.distributed, call the function, leave the group together; the pickled return value."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\..*")
    function, args = pickle.loads(call)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    # Longer than the call may take: a hang is for the caller to report, with every rank's stack.
    patience = timedelta(seconds=timeout + 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    result = pickle.dumps(function(rank, world_size, *args))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def _pickled(error: BaseException) -> bytes | None:
    """The exception for the caller, where it survives pickling."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # any class may refuse to be pickled; its traceback is sent as text anyway
        return None
    return data
