"""YAML files: what is read, what is refused and how, and that every config survives being written and read."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.config import Config, dump, load_config, load_plain_yaml, parse_command, read_yaml
from megatron_prune.config.options import Option, options_of, sections_of
from megatron_prune.errors import UserError

# 1,000 times a list of 1,000 values.
BOMB = f"model: {{hf_model: &a [{'x,' * 1000}]}}\ndata: {{data_path: [{'*a,' * 1000}]}}"

TEXTS = st.text(min_size=1).filter(str.strip)


def values_of(option: Option) -> st.SearchStrategy:
    """Any value that the option's type and limits allow."""
    rules = option.rules
    if option.is_named:
        parts = st.builds(option.kind.part, **{part.name: values_of(part) for part in option.parts})
        return st.builds(option.kind, st.dictionaries(st.sampled_from(("head", "ffn", "one-of-mine")), parts))
    if option.parts:
        return st.builds(option.kind, **{part.name: values_of(part) for part in option.parts})
    if option.kind is tuple:
        names = st.sampled_from(option.choices or ("head", "ffn", "stem", "one-of-mine"))
        values = st.lists(names, min_size=1, unique=True).map(tuple)
    elif option.choices:
        values = st.sampled_from(option.choices)
    elif option.kind is bool:
        values = st.booleans()
    elif option.kind is int:
        values = st.integers(int(rules.at_least or 0), 10**18)
    elif option.kind is float:
        values = st.floats(rules.at_least or 1e-300, 0.9999999 if rules.below else 1e300)
    else:
        values = TEXTS
    return st.none() | values if option.optional else values


CONFIGS = st.builds(
    Config,
    **{
        section: st.builds(cls, **{option.name: values_of(option) for option in options_of(cls, section)})
        for section, cls in sections_of(Config).items()
    },
)


@settings(max_examples=30, deadline=None)
@given(CONFIGS)
def test_dump_and_read_give_the_same_config(config):
    assert read_yaml(dump(config), "dump") == config.settled
    assert read_yaml(dump(config, documented=True), "dump") == config.settled


@settings(max_examples=30, deadline=None)
@given(CONFIGS)
def test_a_dump_means_the_same_to_other_yaml_readers(config):
    expected = dataclasses.asdict(config)
    expected["pruning"]["types"] = list(expected["pruning"]["types"])
    groups = config.pruning.groups
    expected["pruning"]["groups"] = {name: dataclasses.asdict(group) for name, group in groups.items()}
    assert yaml.safe_load(dump(config)) == expected


def test_the_printed_default_config_documents_and_equals_the_defaults():
    text = parse_command(["--print-default-config"]).text
    assert read_yaml(text, "default") == Config()
    assert "  # pipeline stages [a whole number; at least 1]\n  pipeline_model_parallel_size: 1\n" in text
    for section, cls in sections_of(Config).items():
        for option in options_of(cls, section):
            above = text[: text.index(f"\n  {option.name}: ")].splitlines()[-1]
            assert above.startswith("  # "), f"{option.key} has no comment above it"


def test_an_empty_file_and_empty_sections_are_the_defaults():
    assert read_yaml("", "run.yaml") == read_yaml("# nothing\n", "run.yaml") == read_yaml("model:\n", "x") == Config()


def test_values_are_read_by_the_type_of_their_field():
    config = read_yaml(
        """
        data: {data_path: 0.3 a/x 0.7 b/y, split: "98,2,0"}
        training: {train_iters: 1e4, seed: 1_234}
        optimizer: {lr: 3e-4, weight_decay: 0, clip_grad: .5}
        pruning: {target_params: 1.1B, ratio: 1:9, types: [head, ffn], groups: {stem: {cost: 2}, ffn: {round_to: 64}}}
        continued: {continue_tokens: 500B}
        checkpoint: {load: "null", save: null, ckpt_step: ~}
        logging: {wandb_project: no, log_throughput: false}
        """,
        "run.yaml",
    )
    assert config.data.data_path == "0.3 a/x 0.7 b/y" and config.data.split == "98,2,0"
    assert config.training.train_iters == 10_000 and config.training.seed == 1234
    assert config.optimizer.lr == 3e-4 and config.optimizer.weight_decay == 0 and config.optimizer.clip_grad == 0.5
    assert config.pruning.target_params == 1_100_000_000 and config.continued.continue_tokens == 500 * 10**9
    assert config.pruning.ratio_steps == (1, 9) and config.pruning.types == ("head", "ffn")
    groups = config.pruning.groups
    assert [groups[name].cost for name in ("head", "ffn", "stem")] == [None, None, 2]
    assert [groups[name].round_to for name in ("head", "ffn", "stem")] == [None, 64, None]
    assert config.checkpoint.load == "null" and config.checkpoint.save is None and config.checkpoint.ckpt_step is None
    assert config.logging.wandb_project == "no" and config.logging.log_throughput is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", 'run.yaml: unknown section "modle"; did you mean the section "model"?'),
        ("lr: 1", 'run.yaml: unknown section "lr"; "lr" belongs under the section optimizer'),
        (
            "parallel: {tensor_model_paralel_size: 2}",
            'run.yaml: unknown key "tensor_model_paralel_size" in section parallel; '
            'did you mean "tensor_model_parallel_size"?',
        ),
        ("training: {lr: 1}", 'unknown key "lr" in section training; "lr" belongs under the section optimizer'),
        ("training: {min-lr: 1}", 'in section training; did you mean "min_lr" in the section optimizer?'),
        ("model: {qqqqqq: 1}", "sections are model, parallel, data,"),
        (
            "pruning: {quantum: {fnn: 1}}",
            "run.yaml: pruning.quantum: expected a mapping with the keys head, ffn, stem",
        ),
        (
            "pruning: {groups: {ffn: {qantum: 1}}}",
            'pruning.groups in run.yaml: ffn: unknown key "qantum", expected names, each with a mapping with the keys',
        ),
        ("training: {seed: 3.5}", 'training.seed in run.yaml: expected a whole number, got "3.5"'),
        ("training: {seed: true}", 'expected a whole number, got "true"'),
        ("training: {seed: 2K}", 'expected a whole number, got "2K"'),
        ("training: {seed: null}", "expected a whole number, got null"),
        ("training: {seed: [1]}", "expected a whole number, got a list"),
        ("training: {seed: 1e30}", 'expected a whole number, got "1e30"'),
        ("training: {bf16: 1}", 'training.bf16 in run.yaml: expected true or false, got "1"'),
        ("training: {bf16: yes}", 'expected true or false, got "yes"'),
        ("optimizer: {lr: fast}", 'optimizer.lr in run.yaml: expected a number, got "fast"'),
        ("optimizer: {lr: .nan}", 'expected a number, got ".nan"'),
        ("optimizer: {lr: 1e999}", 'expected a number, got "1e999"'),
        (
            "optimizer: {lr_decay_style: cosin}",
            'expected one of constant, linear, cosine, WSD, inverse-square-root, got "cosin"',
        ),
        ("model: {attention_backend: flash}", 'expected sdpa, got "flash"'),
        ("model: {hf_model: {a: 1}}", "model.hf_model in run.yaml: expected text or null, got a mapping"),
        ('model: {hf_model: ""}', 'expected text or null, got ""'),
        (
            "pruning: {target_params: 469.0000001}",
            'expected a whole number such as 469e6 or 469M or null, got "469.0000001"',
        ),
        ("pruning: {types: head}", 'expected a list of names, got "head"'),
        ("pruning: {types: [head, [layer]]}", "expected a list of names, got a list in it"),
        ("pruning: {types: [head, head]}", "expected a list of names, got an item twice"),
        ("pruning: {types: []}", "got an empty list"),
        (
            "pruning: {group_cost: {ffn: 1.5}}",
            'pruning.groups in run.yaml: ffn: cost: expected a whole number or null, got "1.5"',
        ),
        ("pruning: {group_cost: 3}", "pruning.group_cost: expected a mapping with the keys head, ffn, stem"),
        ("pruning: {groups: {ffn: 3}}", "pruning.groups in run.yaml: ffn: expected names, each with a mapping"),
        ("training: {seed: 1}\ntraining: {seed: 2}", 'run.yaml, line 2: the key "training" is given twice'),
        ("training:\n  seed: 1\n  seed: 2", 'run.yaml, line 3: the key "seed" is given twice'),
        ("training: [1, 2", "run.yaml, line 1: not valid YAML"),
        ("- training", "run.yaml: expected sections (model, parallel,"),
        ("training: 5", "run.yaml: expected keys and values under the section training"),
        ("a: &a [*a]", "run.yaml, line 1: nested too deep"),
        ("a: " + "[" * 100_000, "nested too deep"),
        (BOMB, "more than 100,000 values, aliases of aliases perhaps"),
        ("? [a, b]\n: 1", "run.yaml, line 1: a key is a word"),
        ("k: &a [1, 2]\n? [*a, *a]\n: 1", "a key is a word"),
        ("? &a [*a]\n: 1", "a key is a word"),
        ("training: {seed: " + "9" * 6000 + "}", "training.seed in run.yaml: expected a whole number"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("model: \x00", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_named(text, message):
    with pytest.raises(UserError) as caught:
        read_yaml(text, "run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {k: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}",
        *("a: *b", "a: [", "[" * 50_000, "2001-99-99", "!!int x", "!!timestamp x", "!!bool x", "9" * 6000, "{[a]: 1}"),
        *("!!python/object:os.system x", "!!python/name:os.system", "a: \x00", "%YAML 9.9", "!!float '.'", "? {a: 1}"),
    ],
    ids=lambda text: text[:20],
)
def test_a_strangers_yaml_is_read_or_a_value_error(text):
    with pytest.raises(ValueError, match="no YAML"):
        load_plain_yaml(text)
    assert load_plain_yaml("a: [1, b]") == {"a": [1, "b"]} and load_plain_yaml("") is None


def test_files_that_cannot_be_read_are_named(tmp_path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "absent.yaml", "cannot read the configuration file"),
        (tmp_path, "cannot read the configuration file"),
        (binary, "not a text file in UTF-8"),
        ("/dev/zero", "goes on after"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_config(["--config", str(path)])
        assert str(path) in str(caught.value)
