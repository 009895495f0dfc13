"""The one way of reading command lines: flags are the fields of dataclasses of options (options.py).

`pretrain`, the commands in megatron_prune/commands and the launcher declare theirs so, and share spelling, help and
messages. A flag takes the words that follow it (`--seq-length 2048`, `--seq-length=2048`); a switch takes none and may
have a second flag (`--bf16`, `--no-bf16`); lists take several words (`--prune-types head ffn`), mappings `key=value`
words (`--prune-groups ffn.quantum=64`, which leaves the other keys alone); the word null unsets a field that may be
null. Later flags win over earlier ones. Nothing is abbreviated and nothing is guessed: a wrong word is an error that
names the nearest.

    CommandLine   what a command takes: its own options, and maybe sections of the configuration
    Given         what was on the command line
"""

import dataclasses
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_prune.config.moved import renamed_flag
from megatron_prune.config.options import Option, options_of
from megatron_prune.config.validation import check_option
from megatron_prune.config.values import RawValue, convert
from megatron_prune.config.yaml_file import limits
from megatron_prune.errors import UserError, did_you_mean, one_line

OWN = "own"  # section of a command's own options
T = TypeVar("T")


@dataclass(frozen=True)
class CommandLine:
    """What a command takes.

    Arguments:
        call: what stands before the flags: "megatron-prune inspect".
        about: one sentence or more.
        own: dataclass of the command's own options. A switch that is off by default has no second flag.
        sections: name -> dataclass, sections of the configuration that are taken as well.
        argument: what a word without a flag is, such as CONFIG; None: there are no such words.
        ending: more lines of help.
    """

    call: str
    about: str
    own: type
    sections: Mapping[str, type] = field(default_factory=dict)
    argument: str | None = None
    ending: str = ""

    def read(self, argv: Sequence[str]) -> "Given | None":
        """What the words (without the program's name) say; None when they ask for help. Raises UserError."""
        if "--help" in argv or "-h" in argv:
            return None
        known, flags, arguments = self.flags(), [], list[str]()
        for flag, words in self._split(argv):
            if flag is None:
                arguments += words
                continue
            flag, words = renamed_flag(flag, words) if flag not in known else (flag, words)
            if flag not in known:
                raise UserError(_unknown(flag, known))
            target, several = known[flag], len(words) > 1
            if self.argument is not None and target.kind is not tuple and (several or target.kind is bool):
                cut = 0 if target.kind is bool else 1
                words, arguments = words[:cut], arguments + words[cut:]
            flags.append((target, flag, tuple(words)))
        for word in arguments:
            if word.startswith("-"):
                raise UserError(_unknown(word, known))
        return Given(self, tuple(flags), tuple(arguments))

    def help_text(self) -> str:
        """Every flag, section after section, with what it takes, means and defaults to."""
        own = [found for found in options_of(self.own, OWN) if found.rules.required]
        words = [*filter(None, [self.argument]), *(f"{found.flag} {found.metavar}" for found in own)]
        usage = " ".join(("Usage:", self.call, *words, "[--flag value ...]"))
        lines = [*_wrapped(usage, ""), "", *_wrapped(self.about, ""), ""]
        for found in options_of(self.own, OWN):
            off = f" | {found.off_flag}" if found.off_flag and found.default is not False else ""
            facts = [*limits(found), *_own_default(found)]
            lines += _help_entry(
                f"{found.flag}{off} {found.metavar}".rstrip(),
                found.meaning + (f" [{'; '.join(facts)}]" if facts else ""),
            )
        lines += _help_entry("--help", "show this, and leave")
        for section, cls in self.sections.items():
            lines += ["", *_wrapped(f"{section}: {' '.join((cls.__doc__ or '').split())}", "")]
            for found in options_of(cls, section):
                off = f" | {found.off_flag}" if found.off_flag else f" {found.metavar}"
                facts = [*limits(found), f"default {_default(found)}"]
                lines += _help_entry(f"{found.flag}{off}", f"{found.meaning} [{'; '.join(facts)}]")
        return "\n".join([*lines, *(["", self.ending.strip()] if self.ending else [])]) + "\n"

    def _split(self, argv: Sequence[str]) -> Iterator[tuple[str | None, list[str]]]:
        """Cut the command line into (flag, words that follow it); (None, words) for those before the first flag."""
        flag, words = None, list[str]()
        for token in argv:
            name, equals, value = token.partition("=")
            if name.startswith("--") and not any(map(str.isspace, name)):  # --slurm "--ntasks 1" has a value
                yield flag, words
                flag = name
                words = [value] if equals else []
            elif flag is None and self.argument is None:
                word, known = one_line(token), self.flags()
                example = "--config" if "--config" in known else next(iter(known))
                raise UserError(f'unexpected argument "{word}": expected a flag, such as {example} {word}')
            else:
                words.append(token)
        yield flag, words

    def flags(self) -> dict[str, Option]:
        """Every flag that the command knows, `--no-...` ones too -> the option that it sets."""
        flags = {}
        for section, cls in {OWN: self.own, **self.sections}.items():
            for found in options_of(cls, section):
                flags[found.flag] = found
                if found.off_flag is not None and (section != OWN or found.default is not False):
                    flags[found.off_flag] = found
        return flags


@dataclass(frozen=True)
class Given:
    """What was on the command line.

    Arguments:
        flags: (option, flag as it was spelled, words after it), in order.
        arguments: words without a flag.
    """

    line: CommandLine
    flags: tuple[tuple[Option, str, tuple[str, ...]], ...]
    arguments: tuple[str, ...]

    def own(self) -> Any:
        """The command's own options (of the class `line.own`), checked. Raises UserError."""
        values = self.fill(OWN, self.line.own())
        for found in options_of(self.line.own, OWN):
            value = getattr(values, found.name)
            if found.rules.required and value == found.default:
                raise UserError(f"{found.flag} is not given: {found.meaning}")
            check_option(found, value, found.flag)
        return values

    def fill(self, section: str, values: T) -> T:
        """`values`, a dataclass of the section's options, with what the flags say about it. Raises UserError."""
        for target, flag, words in self.flags:
            if target.section == section:
                raw, current = _raw_value(target, flag, words), getattr(values, target.name)
                values = dataclasses.replace(  # type: ignore[type-var]
                    values, **{target.name: convert(target, raw, flag, current)}
                )
        return values


def _unknown(flag: str, known: Mapping[str, Option]) -> str:
    nearest = did_you_mean(flag.replace("_", "-"), known)
    if nearest is None:
        return f"unknown flag {one_line(flag)}; --help lists all of them"
    key = "" if known[nearest].section == OWN else f" ({known[nearest].key})"
    return f"unknown flag {one_line(flag)}; did you mean {nearest}{key}?"


def _raw_value(target: Option, flag: str, words: Sequence[str]) -> RawValue:
    """The words after a flag as the value that a YAML file would hold."""
    if target.kind is bool:
        if words:
            other = f"; {target.off_flag} turns it off" if flag == target.flag and target.section != OWN else ""
            raise UserError(f'{flag} is a switch and takes no value, got "{one_line(words[0])}"{other}')
        return "true" if flag == target.flag else "false"
    if not words:
        raise UserError(f"{flag} needs a value: {target.expected}")
    if list(words) == ["null"] and target.optional:
        return None
    if target.parts:
        pairs = [word.partition("=") for word in words]
        if not all(equals for _, equals, _ in pairs):
            raise UserError(f'{flag}: expected {target.metavar}, got "{one_line(" ".join(words))}"')
        values = {name: None if value == "null" else value for name, _, value in pairs}
        return _under_names(target, flag, values) if target.is_named else values
    if target.kind is tuple:
        return list(words)
    if len(words) > 1 and not target.rules.several_words:
        raise UserError(f"{flag} takes one value, got {len(words)}: {one_line(' '.join(words))}")
    return " ".join(words if len(words) == 1 else map(_quoted, words))


def _under_names(target: Option, flag: str, values: Mapping[str, str | None]) -> RawValue:
    """{"ffn.quantum": "64"} -> {"ffn": {"quantum": "64"}}."""
    nested: dict[str, dict[str, str | None]] = {}
    for path, value in values.items():
        name, dot, part = path.partition(".")
        if not dot:
            raise UserError(f'{flag}: expected {target.metavar}, got "{one_line(path)}"')
        nested.setdefault(name, {})[part] = value
    return dict(nested)


def _quoted(word: str) -> str:
    """A word of several, such as a blend's prefix, quoted where it would fall apart or lose a quote."""
    return shlex.quote(word) if set(word) & set(" \t\n\"'\\") else word


def _default(found: Option) -> str:
    if found.parts:
        return " ".join(f"{'NAME.' * found.is_named}{part.name}={_default(part)}" for part in found.parts)
    if isinstance(found.default, tuple):
        return " ".join(found.default)
    if found.default is None:
        return "null"
    return str(found.default).lower() if found.kind is bool else str(found.default)


def _own_default(found: Option) -> list[str]:
    """The default of a command's own option where its help does not say what happens without it."""
    return [] if found.default in (None, False, ()) else [f"default {_default(found)}"]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _help_entry(usage: str, text: str) -> list[str]:
    first, *more = _wrapped(usage, "  ")
    return [first, *(f"      {line}" for line in more), *_wrapped(text, " " * 6)]
