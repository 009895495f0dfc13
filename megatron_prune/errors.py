"""Errors meant for the person who launched the run.

`UserError` is raised for every mistake a user can mend: a wrong option, file or layout. Its message is one line that
names the field or file and says what to do; entry points print it on one rank, without a traceback, and exit with 2.
Anything else that escapes is a defect and keeps its traceback. Names from outside are shown escaped, in log lines, too
(`log_lines`).
"""

import difflib
import logging
from collections.abc import Iterable


def one_line(text: str) -> str:
    """Text from outside as it may stand in a line on a terminal: characters that cannot be printed are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, in its first line; the error's name where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(wrong: str, known: Iterable[str]) -> str | None:
    """The known name nearest to a wrong one, or None when none is near."""
    nearest = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return nearest[0] if nearest else None


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(one_line, super().format(record).split("\n")))


def log_lines(level: int) -> None:
    """Send log lines to stderr, unless they go somewhere already; what a terminal would obey is escaped."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Escaped("%(message)s"))
    logging.basicConfig(handlers=[handler], level=level)


class UserError(ValueError):
    """A mistake in what the user asked for; the message is one line and says how to mend it.

    Names of files, fields and classes in it may be a stranger's: what a terminal would obey is escaped.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class DisagreementError(RuntimeError):
    """Ranks hold different decisions or layouts; raised before any weight is touched, naming the ranks that differ."""


class TrainingStoppedError(UserError):
    """The run cannot go on by its own rules (losses that are not finite, a checkpoint that cannot be written); raised
    by all ranks after the same step, with the checkpoint to go on from."""


class PeerLostError(RuntimeError):
    """A collective failed because another rank died or hung; says what to resume from."""
