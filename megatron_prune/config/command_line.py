"""The command line of a run: `--config FILE` (under it `--recipe FILE`, of another run), then flags that override
single fields, then a few about the run itself.

Every field of `Config` has one flag, a switch has two; flags win over the file. flags.py says how they are spelled.
"""

import dataclasses
from dataclasses import dataclass

from megatron_prune.config.flags import CommandLine, Given
from megatron_prune.config.options import option, sections_of
from megatron_prune.config.recipe import recipe_config
from megatron_prune.config.schema import Config
from megatron_prune.config.validation import check_fields
from megatron_prune.config.yaml_file import dump, read_file
from megatron_prune.errors import UserError


@dataclass(frozen=True)
class GeneralOptions:
    """Flags that say what to do with a configuration; no YAML file holds them."""

    config: str | None = option(None, "YAML file of the run")
    recipe: str | None = option(
        None, "repeat the run whose `megatron-prune recipe` this is, on a source of the same shape", metavar="FILE"
    )
    dry_run: bool = option(False, "check everything, report sizes and costs, train nothing")
    world_size: int | None = option(None, "with --dry-run: the number of processes to plan for", at_least=1)
    print_default_config: bool = option(False, "print a documented configuration with every default, and leave")


PRETRAIN = CommandLine(
    "megatron-prune pretrain --config FILE",
    "Prune a Llama while it keeps training. Each flag overrides the field of the same name in FILE; "
    "--print-default-config prints a FILE with every field and its default.",
    GeneralOptions,
    sections_of(Config),
)


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
    if "--print-default-config" in argv and not {"--help", "-h"} & set(argv):
        return Command(Config(), text=dump(Config(), documented=True))
    given = PRETRAIN.read(argv)
    if given is None:
        return Command(Config(), text=PRETRAIN.help_text())
    general: GeneralOptions = given.own()
    if general.world_size is not None and not general.dry_run:
        raise UserError("--world-size only goes with --dry-run; a real run learns it from its launcher")
    config = configured(given, general.config, general.recipe)
    return Command(config, general.config, general.dry_run, general.world_size)


def configured(given: Given, file: str | None, recipe: str | None = None) -> Config:
    """The configuration of `recipe`, over it that in `file`, with what the flags say; each field is checked alone.
    Raises UserError: a file cannot be read, or a field is wrong."""
    config = Config() if recipe is None else recipe_config(recipe)
    config = config if file is None else read_file(file, config)
    filled = {name: given.fill(name, getattr(config, name)) for name in sections_of(Config)}
    config = dataclasses.replace(config, **filled).settled
    check_fields(config)
    return config
