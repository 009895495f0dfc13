"""What all commands share: they read their flags, work, and turn what goes wrong into one line and an exit status.

run_command    a command of one process
run_on_ranks   a command that may be one of many ranks
check_file, check_plot, check_new_folder   what will be written, tried before anything is computed
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from megatron_prune.commands import COMMANDS
from megatron_prune.config import CommandLine, Given
from megatron_prune.errors import UserError, log_lines, one_line
from megatron_prune.runtime.places import speaks
from megatron_prune.runtime.signals import heeded_signals

NOTHING_WRITTEN = "interrupted; nothing was written"


def run_command(
    name: str,
    own: type,
    work: Callable[[Any], int],
    argv: Sequence[str] | None = None,
    interrupted: str = "interrupted",
    about: str = "",
    first: str | None = None,
) -> int:
    """Run a command of one process; returns the exit status.

    Args:
        name: one of COMMANDS; or how a script outside of the package is called, and `about` what it does.
        own: dataclass of its options, which `work` gets filled; `work` returns the exit status.
        argv: the words after the command; None: this process's.
        interrupted: what to say after Ctrl-C.
        first: flag that words before the first flag stand for.
    """

    def through(given: Given) -> int:
        from megatron_prune.runtime import failures

        try:
            return work(given.own())
        except KeyboardInterrupt:
            sys.stderr.write(f"error: {interrupted}\n")
            return 128 + signal.SIGINT
        except OSError as error:
            reason = failures.mishap(error)
            if reason is None:
                raise
            raise UserError(reason) from error

    words = sys.argv[1:] if argv is None else argv
    if first is not None and words and not words[0].startswith("-"):
        words = [first, *words]
    return run_on_ranks(name, own, through, words, level=logging.WARNING, about=about)


def run_on_ranks(
    name: str,
    own: type,
    work: Callable[[Given], int],
    argv: Sequence[str] | None = None,
    sections: Mapping[str, type] | None = None,
    level: int = logging.ERROR,
    about: str = "",
) -> int:
    """Run a command that may be one of many ranks, of which one tells mistakes; returns the exit status.

    Args:
        sections: of the configuration, whose flags it takes as well.
        level: of the messages that are shown.
    """
    if name in COMMANDS:
        name, about = f"megatron-prune {name}", f"{COMMANDS[name][1]}."
    line = CommandLine(name, about[:1].upper() + about[1:], own, sections or {})
    try:  # torch is imported when the command line is known to be right
        given = line.read(sys.argv[1:] if argv is None else argv)
        if given is not None:
            given.own()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n" if speaks(os.environ) else "")
        return 2
    if given is None:
        sys.stdout.write(line.help_text() if speaks(os.environ) else "")
        return 0
    log_lines(level)
    from megatron_prune.runtime.failures import exit_status

    with _leaving_by_exception():
        return exit_status(lambda: work(given))


@contextmanager
def _leaving_by_exception() -> Iterator[None]:
    """While entered, signals that ask to stop end the process by an exception: what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if _is_in_del(frame):  # which would swallow it
            again = threading.Timer(0.02, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        for other in before:  # what follows is not to be interrupted, but by Ctrl-C
            signal.signal(other, signal.SIG_IGN if other != signal.SIGINT else signal.default_int_handler)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in heeded_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_del(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def check_file(flag: str, value: str) -> None:
    """Raise UserError where the file that `flag` names could not be written."""
    path = Path(value)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {value}: cannot be written; name a file in a folder that exists")


def check_new_folder(flag: str, folder: Path) -> None:
    """Raise UserError unless the `folder` that `flag` names is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {folder}: is there already; name a folder that does not exist or is empty")


def check_plot(flag: str, value: str) -> None:
    """The same for a figure, which needs matplotlib."""
    check_file(flag, value)
    if find_spec("matplotlib") is None:
        raise UserError(f"{flag}: matplotlib is not installed; pip install 'megatron_prune[plot]'")
    if Path(value).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"{flag} {value}: name a file that ends in .png, .svg or .pdf")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print at once, to stdout unless told where; what a terminal would obey is escaped, line by line."""
    print("\n".join(map(one_line, text.split("\n"))), file=stream, flush=True)
