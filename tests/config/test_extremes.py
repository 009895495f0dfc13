"""Extreme values of every field: a run is refused in one line that names the field, or the value is fit to be used."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.config import Config, load_config, validate
from megatron_prune.config.options import all_options
from megatron_prune.errors import UserError

OPTIONS = [option for option in all_options(Config) if not option.parts]
VALUES = [
    *("-1", "0", "nan", "inf", "-inf", "1e23", "1e-300", "1e308", "1e999", "4294967296", "2147483648", "-9e18"),
    *("9" * 400, "0x10", "1_", "", " ", "null", "true", "\x1b[31m", "a\nb", "１２", "1:0", "5,,", "∞"),
]


def refusal(flags: list[str]) -> str | None:
    """The message, or None where the configuration is accepted."""
    try:
        validate(load_config(["--hf-model", "m", "--data-path", "d", *flags]), 1)
    except UserError as error:
        return str(error)
    return None


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_extreme_values_are_one_line_or_usable(chosen):
    flags = [f"{option.flag}={value}" for option, value in chosen if option.kind is not bool]
    message = refusal(flags)
    if message is not None:
        assert message and message.isprintable()
        return
    config = load_config(["--hf-model", "m", "--data-path", "d", *flags])
    for option in OPTIONS:
        value = getattr(getattr(config, option.section), option.name)
        if option.kind is float and value is not None:
            assert math.isfinite(value) and abs(value) < 3.5e38
        if option.kind is int and value is not None and not option.rules.count:
            assert -1 <= value < 2**32


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--seed", "4294967296", "training.seed (--seed) must be at most 4294967295"),
        ("--distributed-timeout-minutes", "1e23", "must be at most 525600"),
        ("--lr", "1e39", "optimizer.lr (--lr) must be at most"),
        ("--adam-eps", "1e-50", "too small to be told from 0"),
        ("--train-iters", "1e12", "training.train_iters (--train-iters) must be at most 2147483647"),
        ("--seq-length", "1e9", "beyond what can be counted"),
    ],
)
def test_values_beyond_their_type_are_named(flag, value, words):
    flags = [flag, value, *(["--train-iters", "2000000000"] if flag == "--seq-length" else [])]
    assert words in (refusal(flags) or "")
