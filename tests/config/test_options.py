"""Every field is one option: unique flags and names, a help, and a default within its own limits."""

import dataclasses
from collections import Counter

import pytest

from megatron_prune.config import Config, check_fields, parse_command
from megatron_prune.config.command_line import PRETRAIN
from megatron_prune.config.options import all_options, sections_of


def test_every_flag_sets_exactly_one_field():
    options = all_options(Config)
    flags = [flag for option in options for flag in (option.flag, option.off_flag) if flag is not None]
    flags += ["--config", "--dry-run", "--world-size", "--print-default-config", "--help"]
    assert [flag for flag, times in Counter(flags).items() if times > 1] == []


def test_field_names_are_unique_over_sections_and_become_the_flags():
    options = all_options(Config)
    assert len({option.name for option in options}) == len(options)
    for option in options:
        prefix = {"pruning": "prune-", "distillation": "distill-"}.get(option.section, "")
        assert option.flag == f"--{prefix}{option.name.replace('_', '-')}"


def test_a_switch_named_no_something_is_turned_off_without_the_no():
    by_name = {option.name: option for option in all_options(Config)}
    assert by_name["bf16"].off_flag == "--no-bf16"
    assert by_name["no_load_optim"].off_flag == "--load-optim"


def test_every_field_of_every_section_is_an_option_with_a_help():
    for section, cls in sections_of(Config).items():
        names = [option.name for option in all_options(Config) if option.section == section]
        assert names == [field.name for field in dataclasses.fields(cls)]
        assert cls.__doc__
    for option in all_options(Config):
        for described in (option, *option.parts):
            assert described.help and not described.help.endswith(".")


def test_defaults_pass_their_own_limits():
    check_fields(Config())


def test_help_shows_every_flag_with_its_default():
    text = PRETRAIN.help_text()
    assert parse_command(["--bf16", "--help"]).text == parse_command(["-h"]).text == text
    for option in all_options(Config):
        assert f"\n  {option.flag}" in text
    assert (
        "--tensor-model-parallel-size N\n      processes that share every layer's weights [at least 1; default 1]"
        in text
    )
    assert "--bf16 | --no-bf16\n" in text
    assert "default NAME.cost=null NAME.floor=1 NAME.limit=null NAME.quantum=null NAME.round_to=null" in " ".join(
        text.split()
    )


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 3  # type: ignore[misc]
