"""Configuration files: strict YAML in, plain or documented YAML out.

Scalars are read as text and converted by the field they are for (values.py), not by YAML's own guesses: 1:9 is a
ratio and not 69 base 60, 3e-4 is a number, `no` is not false. Unquoted null, ~ and nothing at all are null. Unknown
sections and keys, keys given twice and values of a wrong type are errors that name the place.
"""

import dataclasses
import io
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.config.moved import renamed_entry
from megatron_prune.config.options import NamedParts, Option, all_options, options_of, sections_of
from megatron_prune.config.schema import Config
from megatron_prune.config.values import RawValue, convert
from megatron_prune.errors import UserError, did_you_mean, first_line, one_line
from megatron_prune.reading import open_stream

_DEEPEST, _DEEPEST_ANYWHERE = 4, 100
_LONGEST = 1 << 20  # characters; /dev/zero has no end
_MOST = 100_000  # values
_NO_WRAP = 10**9


def read_file(path: str | Path, unnamed: Config | None = None) -> Config:
    """The config in a YAML file; fields it does not name are those of `unnamed` (None: defaults). Raises UserError for
    any mistake."""
    try:
        with io.TextIOWrapper(io.BufferedReader(open_stream(path)), encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8, expected a YAML configuration") from None
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from None
    if len(text) > _LONGEST:
        raise UserError(f"{path}: goes on after {_LONGEST:,} characters, expected a YAML configuration")
    return read_yaml(text, str(path), unnamed)


def read_yaml(text: str, source: str, unnamed: Config | None = None) -> Config:
    """The config in YAML text, as `read_file`; `source` is its name in messages."""
    raw = _parse(text, source)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected sections ({', '.join(sections_of(Config))}) with keys under them")
    base, changes = unnamed or Config(), {}
    for section, entries in raw.items():
        if section not in sections_of(Config):
            raise UserError(f'{source}: unknown section "{one_line(section)}"; {_where_it_belongs(section)}')
        if not isinstance(entries, dict | None):
            raise UserError(f"{source}: expected keys and values under the section {section}")
        changes[section] = dataclasses.replace(getattr(base, section), **_read_section(section, entries or {}, source))
    return dataclasses.replace(base, **changes).settled


def dump(config: Config, documented: bool = False) -> str:
    """YAML of every field of `config`; `read_yaml` gives an equal config back.

    With `documented`, each section and field has a comment above it: its help, type and limits.
    """
    lines: list[str] = []
    for section, cls in sections_of(Config).items():
        if lines:
            lines.append("")
        if documented:
            lines += _comment(" ".join((cls.__doc__ or "").split()), indent="")
        lines.append(f"{section}:")
        for option in options_of(cls, section):
            if documented:
                lines += _comment(f"{option.meaning} [{'; '.join([option.expected, *limits(option)])}]", indent="  ")
            lines.append(f"  {option.name}: {yaml_value(getattr(getattr(config, section), option.name))}")
    return "\n".join(lines) + "\n"


def limits(option: Option) -> Iterator[str]:
    """What an option allows beyond its type, in words."""
    rules = option.rules
    if rules.refused is not None:
        yield f"only {yaml_value(option.default)}: {rules.refused}"
    if rules.at_least is not None:
        yield f"at least {rules.at_least:g}"
    if rules.above is not None:
        yield f"above {rules.above:g}"
    if rules.below is not None:
        yield f"below {rules.below:g}"


def _read_section(section: str, entries: dict[str, Any], source: str) -> dict[str, Any]:
    cls = sections_of(Config)[section]
    known = {option.name: option for option in options_of(cls, section)}
    values: dict[str, Any] = {}
    for name, raw in entries.items():
        name, raw = renamed_entry(section, name, raw, source)
        if name not in known:
            hint = _nearest_key(name, list(known)) or _where_it_belongs(name)
            raise UserError(f'{source}: unknown key "{one_line(name)}" in section {section}; {hint}')
        option = known[name]
        values[name] = convert(option, raw, f"{option.key} in {source}", values.get(name, option.default))
    return values


def _nearest_key(name: str, known: list[str]) -> str | None:
    nearest = did_you_mean(name, known)
    elsewhere = any(option.name == name for option in all_options(Config))
    return f'did you mean "{nearest}"?' if nearest and not elsewhere else None


def _where_it_belongs(name: str) -> str:
    """A hint for a name that is neither a section nor a key of the section it was found in."""
    sections = sections_of(Config)
    for option in all_options(Config):
        if option.name == name:
            return f'"{name}" belongs under the section {option.section}'
    nearest = did_you_mean(name, sections)
    if nearest:
        return f'did you mean the section "{nearest}"?'
    by_name = {option.name: option for option in all_options(Config)}
    nearest = did_you_mean(name, by_name)
    if nearest:
        return f'did you mean "{nearest}" in the section {by_name[nearest].section}?'
    return f"sections are {', '.join(sections)}; --help lists their keys"


def _parse(text: str, source: str) -> RawValue:
    try:
        _count_aliases(text)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if root is None else _plain(root, source, 0, iter(range(_MOST)))
    except RecursionError:
        raise UserError(f"{source}: nested too deep, a configuration has sections, keys and values") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from None


def _plain(node: yaml.Node, source: str, depth: int, left: Iterator[int]) -> RawValue:
    """A YAML node as text, None, list or mapping: scalars stay text, whatever they look like.

    Args:
        left: how many nodes there may be; aliases of aliases can make more than memory holds.
    """
    line = f"{source}, line {node.start_mark.line + 1}"
    if depth > _DEEPEST:
        raise UserError(f"{line}: nested too deep, a configuration has sections, keys and values")
    if next(left, None) is None:
        raise UserError(f"{line}: more than {_MOST:,} values, aliases of aliases perhaps")
    if isinstance(node, yaml.ScalarNode):
        is_null = node.style is None and node.value in ("", "~", "null")
        return None if is_null else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, source, depth + 1, left) for item in node.value]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{line}: a key is a word, not a list or mapping")
        key = str(key_node.value)
        if key in mapping:
            raise UserError(f'{source}, line {key_node.start_mark.line + 1}: the key "{one_line(key)}" is given twice')
        mapping[key] = _plain(value_node, source, depth + 1, left)
    return mapping


def _count_aliases(text: str) -> int:
    """How many there are. Raises RecursionError: it is nested so deep that composing it would take for ever."""
    depth, aliases = 0, 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > _DEEPEST_ANYWHERE:
            raise RecursionError(f"nested deeper than {_DEEPEST_ANYWHERE} levels")
    return aliases


def load_plain_yaml(text: str) -> Any:
    """A stranger's YAML as plain values: without aliases, which can stand for more than memory holds. Raises
    ValueError: it is none, or has aliases."""
    try:
        if _count_aliases(text):
            raise ValueError("aliases")
        return yaml.safe_load(text)
    except Exception as error:  # constructors raise whatever Python does for a value that is none
        raise ValueError(f"no YAML ({first_line(error)})") from error


def yaml_value(value: Any) -> str:
    """How a field's value is spelled."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    elif isinstance(value, NamedParts):
        value = {name: dataclasses.asdict(part) for name, part in value.items()}
    elif isinstance(value, tuple):
        value = list(value)
    escaped = not all(text.isprintable() for text in _texts(value))
    text = yaml.safe_dump(
        value,
        default_style='"' if escaped and isinstance(value, str) else None,
        default_flow_style=True,
        allow_unicode=not escaped,
        width=_NO_WRAP,
        sort_keys=False,
    )
    return str(text).removesuffix("...\n").rstrip("\n")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _texts(part)


def _comment(text: str, indent: str) -> list[str]:
    lead = f"{indent}# "
    return textwrap.wrap(text, width=110, initial_indent=lead, subsequent_indent=lead, break_on_hyphens=False)
