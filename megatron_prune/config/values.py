"""Strict conversion of a YAML value or of flag words into an option's type.

The YAML reader (yaml_file.py) hands over text, None, lists and mappings; the command line turns its words into the
same. So there is one conversion and one spelling of every value, in files and flags alike:
whole numbers 8, 1_000, 1e6 and, for counts, 469M (K, M, B, T are powers of a thousand); numbers 0.1, 3e-4;
true and false; null. What does not fit raises UserError with the field's name and the type it expects.
"""

import dataclasses
import math
import re
from decimal import Decimal
from typing import Any

from megatron_prune.config.options import Option
from megatron_prune.errors import UserError, one_line

RawValue = str | None | list[Any] | dict[str, Any]

_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LARGEST_INT = 10**18


def convert(option: Option, raw: RawValue, where: str, current: Any) -> Any:
    """The value of `option` that `raw` spells.

    Arguments:
        option: what the value is for.
        raw: text, None, list or mapping as the YAML file gives it.
        where: how messages call the place, such as `training.seed in run.yaml` or `--seed`.
        current: the value so far; parts that a mapping does not name keep it.

    Raises:
        UserError: the value is not of the option's type; the message names `where` and the type.
    """
    if raw is None and option.optional:
        return None
    if isinstance(raw, dict) and option.is_named:
        return _convert_named(option, raw, where, current)
    if isinstance(raw, dict) and option.parts:
        return _convert_parts(option, raw, where, current)
    if isinstance(raw, list) and option.kind is tuple:
        return _convert_list(option, raw, where)
    if isinstance(raw, str) and option.kind is not tuple and not option.parts:
        value = _convert_text(option, raw)
        if value is not None:
            return value
    raise UserError(f"{where}: expected {option.expected}, got {_shown(raw)}")


def _convert_parts(option: Option, raw: dict[str, Any], where: str, current: Any) -> Any:
    parts = {part.name: part for part in option.parts}
    changes = {}
    for name, value in raw.items():
        if name not in parts:
            raise UserError(f'{where}: unknown key "{one_line(name)}", expected {option.expected}')
        changes[name] = convert(parts[name], value, f"{where}: {name}", getattr(current, name))
    return dataclasses.replace(current, **changes)


def _convert_named(option: Option, raw: dict[str, Any], where: str, current: Any) -> Any:
    changed = {}
    for name, parts in raw.items():
        if not isinstance(parts, dict):
            raise UserError(f"{where}: {one_line(name)}: expected {option.expected}, got {_shown(parts)}")
        changed[name] = _convert_parts(option, parts, f"{where}: {one_line(name)}", current.of(name))
    return option.kind({**current, **changed})


def _convert_list(option: Option, raw: list[Any], where: str) -> tuple[str, ...]:
    if not option.choices and not option.rules.unique:
        if not all(isinstance(item, str) and item.strip() for item in raw):
            raise UserError(f"{where}: expected {option.expected}, got an empty one")
        return tuple(raw)
    for item in raw:
        if not isinstance(item, str) or (option.choices and item not in option.choices):
            raise UserError(f"{where}: expected {option.expected}, got {_shown(item)} in it")
    if not raw or len(set(raw)) < len(raw):
        problem = "an item twice" if raw else "an empty list"
        raise UserError(f"{where}: expected {option.expected}, got {problem}")
    return tuple(raw)


def _convert_text(option: Option, text: str) -> bool | int | float | str | None:
    """The value that `text` spells, or None when it spells none."""
    if option.kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if option.kind is int:
        return whole_number(text, suffixes=option.rules.count)
    if option.kind is float:
        return _number(text)
    if option.choices:
        return text if text in option.choices else None
    return text if text.strip() else None


def whole_number(text: str, suffixes: bool) -> int | None:
    """The whole number that `text` spells, with `suffixes` also 469M and the like; None when it spells none."""
    scale = 1
    if suffixes and text[-1:].upper() in _SUFFIXES:
        text, scale = text[:-1], _SUFFIXES[text[-1].upper()]
    if _NUMBER.fullmatch(text) is None:
        return None
    value = Decimal(text.replace("_", "")) * scale
    return int(value) if abs(value) <= _LARGEST_INT and value == value.to_integral_value() else None


def _number(text: str) -> float | None:
    if _NUMBER.fullmatch(text) is None:
        return None
    value = float(text.replace("_", ""))
    return value if math.isfinite(value) else None


def _shown(raw: RawValue) -> str:
    """A raw value as messages show it."""
    if raw is None:
        return "null"
    if isinstance(raw, list):
        return "a list"
    if isinstance(raw, dict):
        return "a mapping"
    return f'"{one_line(raw)}"'
