"""What values in stored files must be, each type for people and as a test, and the one check of them."""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError


@dataclass(frozen=True)
class FieldType:
    """What a stored value must be, for people and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _instance(kind: type, words: str) -> FieldType:
    return FieldType(words, lambda value: isinstance(value, kind))


def one_of(*words: str) -> FieldType:
    """The type of a text that is one of `words`."""
    return FieldType(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def table_with(**fields: FieldType) -> FieldType:
    """The type of a table that has these fields, each of its type, and maybe others."""
    return FieldType(
        f"a table with {', '.join(fields)}",
        lambda value: isinstance(value, dict) and all(kind.fits(value.get(name)) for name, kind in fields.items()),
    )


def is_plain(value: Any) -> bool:
    """Whether JSON can say it; arrays and tensors it cannot."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


COUNT = FieldType("a whole number", lambda value: type(value) is int and 0 <= value < 1 << 62)
NUMBER = FieldType("a number", lambda value: type(value) in (int, float) and -1e300 < value < 1e300)
MEASURED = FieldType("a number, finite or not", lambda value: type(value) in (int, float))
TEXT, LIST, TABLE = _instance(str, "text"), _instance(list, "a list"), _instance(dict, "a table")
PLAIN_TABLE = FieldType("a table of plain values", lambda value: TABLE.fits(value) and is_plain(value))
TABLES = FieldType(
    "a list of tables of plain values", lambda value: LIST.fits(value) and all(map(PLAIN_TABLE.fits, value))
)


def check_fields(values: Mapping[str, Any], types: Mapping[str, FieldType], file: Path, required: bool = False) -> None:
    """See that fields read from `file` are of their types; those that are absent or None are not `required`. Raises
    UserError: one is not; names file and field."""
    for name, wanted in types.items():
        value = values.get(name)
        if (required or value is not None) and not wanted.fits(value):
            raise UserError(f"{file}: {name}: expected {wanted.words}, found {reprlib.repr(value)}")
