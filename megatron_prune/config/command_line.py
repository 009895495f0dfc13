"""The command line: `--config FILE`, then flags that override single fields, then a few flags about the run itself.

Every field of `Config` has one flag (`--seq-length 2048`, `--flag=value` works too); a switch has two (`--bf16`,
`--no-bf16`); lists take several words (`--prune-types head ffn`), mappings `key=value` words (`--prune-quantum ffn=64`,
which leaves the other keys alone); the word null unsets a field that may be null. Flags win over the file, later flags
over earlier ones. Nothing is abbreviated and nothing is guessed: a wrong word is an error that names the nearest.
"""

import dataclasses
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_prune.config.options import Option, all_options, option, options_of, sections_of
from megatron_prune.config.schema import Config
from megatron_prune.config.validation import check_fields, check_option
from megatron_prune.config.values import RawValue, convert, did_you_mean
from megatron_prune.config.yaml_file import dump, limits, read_file
from megatron_prune.errors import UserError, one_line

_GENERAL = "general"


@dataclass(frozen=True)
class GeneralOptions:
    """Flags that say what to do with a configuration; no YAML file holds them."""

    config: str | None = option(None, "YAML file of the run")
    dry_run: bool = option(False, "check everything, report sizes and costs, train nothing")
    world_size: int | None = option(None, "with --dry-run: the number of processes to plan for", at_least=1)
    print_default_config: bool = option(False, "print a documented configuration with every default, and leave")
    help: bool = option(False, "show this, and leave")


@dataclass(frozen=True)
class Command:
    """What the command line asks for.

    Arguments:
        config: the effective configuration, each field checked alone (`validate` checks them together).
        config_file: the file given by --config, if any.
        dry_run: check and estimate only.
        world_size: processes to plan for in a dry run, if given.
        text: when not None, print this (help or default configuration) and leave with 0; `config` then is the default.
    """

    config: Config
    config_file: str | None = None
    dry_run: bool = False
    world_size: int | None = None
    text: str | None = None


def load_config(argv: list[str]) -> Config:
    """The effective configuration of a command line; see `parse_command` for the rest of it. Raises UserError."""
    return parse_command(argv).config


def parse_command(argv: list[str]) -> Command:
    """Read the command line (without the program's name). Raises UserError for any mistake in it or in the file."""
    if "--help" in argv or "-h" in argv:
        return Command(Config(), text=help_text())
    if "--print-default-config" in argv:
        return Command(Config(), text=dump(Config(), documented=True))
    given = [(_find(flag), flag, words) for flag, words in _split(argv)]
    general = GeneralOptions()
    for target, flag, words in given:
        if target.section == _GENERAL:
            general = _override(general, target, flag, words)
    if general.world_size is not None and not general.dry_run:
        raise UserError("--world-size only goes with --dry-run; a real run learns it from its launcher")
    for found in options_of(GeneralOptions, _GENERAL):
        check_option(found, getattr(general, found.name), found.flag)
    config = Config() if general.config is None else read_file(general.config)
    for target, flag, words in given:
        if target.section != _GENERAL:
            section = _override(getattr(config, target.section), target, flag, words)
            config = dataclasses.replace(config, **{target.section: section})
    check_fields(config)
    return Command(config, general.config, general.dry_run, general.world_size)


def help_text() -> str:
    """Every flag, section after section, with what it takes, means and defaults to."""
    lines = [
        "Usage: python -m megatron_prune.pretrain --config FILE [--flag value ...]",
        "",
        "Prune a Llama while it keeps training. Each flag overrides the field of the same name in FILE;",
        "--print-default-config prints a FILE with every field and its default.",
        "",
        "general: what to do with a configuration",
    ]
    for found in options_of(GeneralOptions, _GENERAL):
        lines += _help_entry(f"{found.flag} {found.metavar}".rstrip(), found.help)
    for section, cls in sections_of(Config).items():
        lines += ["", *textwrap.wrap(f"{section}: {' '.join((cls.__doc__ or '').split())}", width=110)]
        for found in options_of(cls, section):
            usage = f"{found.flag} | {found.off_flag}" if found.off_flag else f"{found.flag} {found.metavar}"
            lines += _help_entry(
                usage, f"{found.meaning} [{'; '.join([*limits(found), f'default {_default(found)}'])}]"
            )
    return "\n".join(lines) + "\n"


def _split(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Cut the command line into (flag, words that follow it)."""
    flag, words = None, []
    for token in argv:
        if token.startswith("--"):
            if flag is not None:
                yield flag, words
            flag, equals, value = token.partition("=")
            words = [value] if equals else []
        elif flag is None:
            word = one_line(token)
            raise UserError(f'unexpected argument "{word}": expected a flag, such as --config {word}')
        else:
            words.append(token)
    if flag is not None:
        yield flag, words


def _find(flag: str) -> Option:
    known = _flags()
    if flag in known:
        return known[flag]
    nearest = did_you_mean(flag.replace("_", "-"), known)
    if nearest is None:
        raise UserError(f"unknown flag {one_line(flag)}; --help lists all of them")
    field = "" if known[nearest].section == _GENERAL else f" ({known[nearest].key})"
    raise UserError(f"unknown flag {one_line(flag)}; did you mean {nearest}{field}?")


def _flags() -> dict[str, Option]:
    flags = {found.flag: found for found in options_of(GeneralOptions, _GENERAL)}
    for found in all_options(Config):
        flags[found.flag] = found
        if found.off_flag is not None:
            flags[found.off_flag] = found
    return flags


def _override(section: Any, target: Option, flag: str, words: list[str]) -> Any:
    """The section (a dataclass) with one field set from the words after its flag."""
    current = getattr(section, target.name)
    value = convert(target, _raw_value(target, flag, words), flag, current)
    return dataclasses.replace(section, **{target.name: value})


def _raw_value(target: Option, flag: str, words: list[str]) -> RawValue:
    """The words after a flag as the value that a YAML file would hold."""
    if target.kind is bool:
        if words:
            other = f"; {target.off_flag} turns it off" if flag == target.flag and target.section != _GENERAL else ""
            raise UserError(f'{flag} is a switch and takes no value, got "{one_line(words[0])}"{other}')
        return "true" if flag == target.flag else "false"
    if not words:
        raise UserError(f"{flag} needs a value: {target.expected}")
    if words == ["null"] and target.optional:
        return None
    if target.parts:
        pairs = [word.partition("=") for word in words]
        if not all(equals for _, equals, _ in pairs):
            raise UserError(f'{flag}: expected {target.metavar}, got "{one_line(" ".join(words))}"')
        return {name: None if value == "null" else value for name, _, value in pairs}
    if target.kind is tuple:
        return list(words)
    if len(words) > 1 and not target.rules.several_words:
        raise UserError(f"{flag} takes one value, got {len(words)}: {one_line(' '.join(words))}")
    return " ".join(words if len(words) == 1 else map(_quoted, words))


def _quoted(word: str) -> str:
    """A word of several, such as a blend's prefix, quoted where it would fall apart or lose a quote."""
    return shlex.quote(word) if set(word) & set(" \t\n\"'\\") else word


def _default(found: Option) -> str:
    if found.parts:
        return " ".join(f"{part.name}={_default(part)}" for part in found.parts)
    if isinstance(found.default, tuple):
        return " ".join(found.default)
    if found.default is None:
        return "null"
    return str(found.default).lower() if found.kind is bool else str(found.default)


def _help_entry(usage: str, text: str) -> list[str]:
    return [
        f"  {usage}",
        *textwrap.wrap(text, width=110, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False),
    ]
