"""From dataclass fields to options: what a field is called, which flag sets it, what it accepts, what it means.

`option(...)` declares a field of a section (default, help, limits); `options_of(cls, section)` reads such fields back
as `Option`s, and `all_options(cls)` those of every section of a config class. Nothing else reads the field metadata.

Types a field may have: bool, int, float, str, Literal[...] of strings, tuple[Literal[...], ...] (a list of choices),
tuple[str, ...] (a list of texts), each of them `| None`, another frozen dataclass of options (a mapping of parts, such
as {factor: 2, window: 20}), or `NamedParts` (such mappings by names of the user's: {head: {floor: 4}}).
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

_NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
T = TypeVar("T")


class NamedParts(Mapping[str, Any]):
    """A frozen mapping of names to instances of the dataclass `part`; a name that is not in it has the defaults."""

    part: ClassVar[type]

    def __init__(self, items: Mapping[str, Any] | None = None, **named: Any) -> None:
        self._items = {**(items or {}), **named}

    def of(self, name: str) -> Any:
        """The part called `name`; one of defaults where none was given."""
        return self._items[name] if name in self._items else self.part()

    def having(self, name: str, **fields: Any) -> Any:
        """A copy in which `fields` of `name` are changed."""
        return type(self)({**self._items, name: dataclasses.replace(self.of(name), **fields)})

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._changed() == other._changed()

    def __hash__(self) -> int:
        return hash(frozenset(self._changed().items()))

    def _changed(self) -> dict[str, Any]:
        return {name: part for name, part in self._items.items() if part != self.part()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items})"


@dataclasses.dataclass(frozen=True)
class FieldRules:
    """What a field accepts beyond its type.

    Arguments:
        at_least: least value allowed.
        above: values must be greater than this.
        below: values must be less than this.
        at_most: greatest value allowed; None: what 32 bits hold (a count: 10**18).
        count: a number of tokens, parameters or elements: 469M, 1.1B and 5K are accepted beside 469e6.
        several_words: the flag takes several words and joins them with spaces (a data blend, as in Megatron).
        refused: the reason why any value but the default is refused; None for what works.
        choices: the texts allowed, where the type does not list them. metavar: what follows the flag in the help.
        required: a command does not run without it.
        unique: a list of names, each once and at least one.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    count: bool = False
    several_words: bool = False
    refused: str | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    required: bool = False
    unique: bool = False


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of the configuration as the YAML file, the command line and the messages see it.

    Arguments:
        section: name of the section that holds the field.
        name: the field's name, which is its YAML key.
        flag: the one flag that sets it; for a switch, the flag that makes it true.
        off_flag: for a switch, the flag that makes it false; else None.
        kind: bool, int, float, str, tuple (a list of choices or texts), the dataclass of a mapping's parts, or a
            `NamedParts`.
        choices: the texts allowed, for a Literal or a list of them; else empty.
        optional: whether null is allowed.
        default: the field's default.
        help: one sentence.
        rules: limits and spellings.
    """

    section: str
    name: str
    flag: str
    off_flag: str | None
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    rules: FieldRules

    @property
    def key(self) -> str:
        """`section.name`, the field's full name in messages."""
        return f"{self.section}.{self.name}"

    @property
    def parts(self) -> "tuple[Option, ...]":
        """The parts of a mapping option (each an `Option` that no flag of its own sets); else empty."""
        kind = self.kind.part if issubclass(self.kind, NamedParts) else self.kind
        return options_of(kind, self.key) if dataclasses.is_dataclass(kind) else ()

    @property
    def is_named(self) -> bool:
        """Whether the parts stand under names of the user's."""
        return issubclass(self.kind, NamedParts)

    @property
    def meaning(self) -> str:
        """The help, with that of a mapping's parts."""
        parts = ", ".join(f"{part.name}: {part.help}" for part in self.parts)
        return f"{self.help} ({parts})" if parts else self.help

    @property
    def expected(self) -> str:
        """What the option accepts, as a phrase for messages: "a whole number or null"."""
        if self.parts:
            noun = "a mapping with the keys " + ", ".join(part.name for part in self.parts)
            noun = f"names, each with {noun}" if self.is_named else noun
        elif self.choices:
            several = "a list of " if self.kind is tuple else "one of "
            noun = (several if len(self.choices) > 1 else "") + ", ".join(self.choices)
        elif self.kind is tuple:
            noun = "a list of names" if self.rules.unique else "one or more words"
        else:
            noun = _NOUNS[self.kind] + (" such as 469e6 or 469M" if self.rules.count else "")
        return noun + (" or null" if self.optional else "")

    @property
    def metavar(self) -> str:
        """What follows the flag in the help: "N", "constant|linear", "head=N ffn=N"; empty for a switch."""
        if self.kind is bool:
            return ""
        if self.rules.metavar:
            return self.rules.metavar + (" ..." if self.kind is tuple else "")
        if self.parts:
            return " ".join(f"{'NAME.' * self.is_named}{part.name}={part.metavar}" for part in self.parts)
        if self.choices:
            return " ".join(self.choices) if self.kind is tuple else "|".join(self.choices)
        return _METAVARS[self.kind]


def option(default: Any, help: str, **rules: Any) -> Any:
    """Declare a field of a section; `rules` are those of `FieldRules`."""
    return dataclasses.field(default=default, metadata={"help": help, "rules": FieldRules(**rules)})


def filled(cls: type[T], *sources: Any, **more: Any) -> T:
    """The dataclass `cls` with what `sources` hold under its fields' names, and `more`; the rest has its default."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    found = {name: getattr(source, name) for source in sources for name in names if hasattr(source, name)}
    return cls(**(found | more))


@functools.cache
def options_of(cls: type, section: str) -> tuple[Option, ...]:
    """The options that the fields of the dataclass `cls` declare, in the order of the fields."""
    hints = typing.get_type_hints(cls)
    prefix = getattr(cls, "flag_prefix", "")
    return tuple(_read_field(field, hints[field.name], section, prefix) for field in dataclasses.fields(cls))


@functools.cache
def all_options(cls: type) -> tuple[Option, ...]:
    """The options of every section of the config class `cls`, section after section."""
    return tuple(found for name, section in sections_of(cls).items() for found in options_of(section, name))


@functools.cache
def sections_of(cls: type) -> dict[str, type]:
    """Section name -> dataclass, for the config class `cls`, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _read_field(field: "dataclasses.Field[Any]", hint: Any, section: str, prefix: str) -> Option:
    hint, optional = _without_none(hint)
    kind, choices = hint, field.metadata["rules"].choices
    if typing.get_origin(hint) is tuple:
        kind, choices = tuple, typing.get_args(typing.get_args(hint)[0])
    elif typing.get_origin(hint) is Literal:
        kind, choices = str, typing.get_args(hint)
    is_mapping = dataclasses.is_dataclass(kind) or issubclass(kind, NamedParts)
    assert kind in (*_NOUNS, tuple) or is_mapping, f"{section}.{field.name}: type {hint}"
    word = prefix + field.name.replace("_", "-")
    off_flag = None
    if kind is bool:
        off_flag = "--" + (word.removeprefix("no-") if word.startswith("no-") else f"no-{word}")
    return Option(
        section=section,
        name=field.name,
        flag=f"--{word}",
        off_flag=off_flag,
        kind=kind,
        choices=choices,
        optional=optional,
        default=field.default,
        help=field.metadata["help"],
        rules=field.metadata["rules"],
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True), and leave any other type as (X, False)."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint, False
    rest = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    assert len(rest) == 1, f"a field has one type, perhaps with None: {hint}"
    return rest[0], True
