"""Flags: they override the file, one flag per field, and a wrong word is named with its nearest neighbour."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.config import Config, load_config, parse_command, read_yaml
from megatron_prune.errors import UserError


def test_without_arguments_everything_is_default():
    command = parse_command([])
    assert command.config == Config() and command.text is None and not command.dry_run and command.world_size is None


def test_flags_win_over_the_file_and_leave_the_rest(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "training: {seed: 7, bf16: true, train_iters: 50}\n"
        "pruning: {groups: {head: {quantum: 2}, ffn: {quantum: 64}}, target_params: 5M}\n"
    )
    command = parse_command(
        f"--seed 8 --no-bf16 --config {file} --prune-groups ffn.quantum=128 stem.quantum=4 --prune-target-params null "
        "--tensor-model-parallel-size 2 --sequence-parallel --lr=1e-3 --prune-types head stem".split()
    )
    config = command.config
    assert command.config_file == str(file)
    assert (config.training.seed, config.training.bf16, config.training.train_iters) == (8, False, 50)
    groups = config.pruning.groups
    assert [groups[name].quantum for name in ("head", "ffn", "stem")] == [2, 128, 4]
    assert config.pruning.target_params is None and config.pruning.types == ("head", "stem")
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.splits_sequences
    assert config.optimizer.lr == 1e-3


def test_the_order_of_flags_decides_between_repeats_and_the_file_comes_first():
    assert load_config(["--seed", "5", "--seed", "6"]).training.seed == 6
    assert load_config(["--bf16", "--no-bf16"]).training.bf16 is False
    assert load_config(["--no-load-optim"]).checkpoint.no_load_optim is True
    assert load_config(["--no-load-optim", "--load-optim"]).checkpoint.no_load_optim is False


@pytest.mark.parametrize("spelling", ["469e6", "469M", "469000000", "0.469B", "469_000_000", "469m"])
def test_counts_may_be_spelled_as_people_do(spelling):
    assert load_config(["--prune-target-params", spelling]).pruning.target_params == 469_000_000


def test_values_with_spaces_signs_and_equal_signs_stay_as_given():
    assert load_config(["--data-path", "0.3 ./a 0.7 ../b=c"]).data.data_path == "0.3 ./a 0.7 ../b=c"
    assert load_config(["--data-path", "0.3", "a", "0.7", "b"]).data.data_path == "0.3 a 0.7 b"
    assert load_config(["--save=runs/x=1"]).checkpoint.save == "runs/x=1"
    assert load_config(["--load=--odd"]).checkpoint.load == "--odd"
    assert load_config(["--load", "--odd place", "--seed", "3"]).checkpoint.load == "--odd place", "no flag has spaces"


def test_mapping_parts_may_be_null():
    words = ["--prune-groups", "head.cost=7"]
    assert load_config(words).pruning.groups["head"].cost == 7
    assert load_config([*words, "--prune-groups", "head.cost=null"]).pruning.groups["head"].cost is None


def test_old_names_of_group_options_set_the_new_ones_and_say_so(caplog):
    old = "--prune-min-heads 2 --prune-min-hidden 8 --prune-group-cost head=7 --prune-quantum ffn=64 stem=4 "
    found = load_config(f"{old} --prune-round-widths ffn=16 hidden=8".split()).pruning.groups
    new = "head.floor=2 stem.floor=8 head.cost=7 ffn.quantum=64 stem.quantum=4 ffn.round_to=16 stem.round_to=8"
    assert found == load_config(["--prune-groups", *new.split()]).pruning.groups
    assert "--prune-min-heads is called --prune-groups head.floor=2 now" in caplog.messages
    assert len(caplog.messages) == 5, "one line per old name"


def test_general_flags_go_into_the_command():
    command = parse_command(["--dry-run", "--world-size", "64"])
    assert command.dry_run and command.world_size == 64 and command.config == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--tensor-model-paralel-size 2",
            "unknown flag --tensor-model-paralel-size; did you mean --tensor-model-parallel-size "
            "(parallel.tensor_model_parallel_size)?",
        ),
        ("--micro_batch_size 2", "did you mean --micro-batch-size (training.micro_batch_size)?"),
        ("--target-params 5", "did you mean --prune-target-params (pruning.target_params)?"),
        ("--dryrun", "unknown flag --dryrun; did you mean --dry-run?"),
        ("--seq 5", "unknown flag --seq"),
        ("--xyzzyxyzzy", "unknown flag --xyzzyxyzzy; --help lists all of them"),
        ("run.yaml", 'unexpected argument "run.yaml": expected a flag, such as --config run.yaml'),
        ("--seed", "--seed needs a value: a whole number"),
        ("--seed --bf16", "--seed needs a value: a whole number"),
        ("--seed 1 2", "--seed takes one value, got 2: 1 2"),
        ("--seed 3.5", '--seed: expected a whole number, got "3.5"'),
        ("--seed null", '--seed: expected a whole number, got "null"'),
        ("--seed -1", "training.seed (--seed) must be at least 1, got -1"),
        ("--bf16 true", '--bf16 is a switch and takes no value, got "true"; --no-bf16 turns it off'),
        ("--no-bf16=1", '--no-bf16 is a switch and takes no value, got "1"'),
        ("--load=", '--load: expected text or null, got ""'),
        ("--prune-types head head", "--prune-types: expected a list of names, got an item twice"),
        ("--prune-quantum 64", '--prune-quantum: expected head=N ffn=N stem=N, got "64"'),
        ("--prune-quantum ffn=x", '--prune-groups: ffn: quantum: expected a whole number or null, got "x"'),
        ("--prune-groups ffn.quantum=0", "pruning.groups (--prune-groups): ffn: quantum must be at least 1, got 0"),
        ("--prune-groups quantum=1", "--prune-groups: expected NAME.cost=N"),
        (
            "--prune-target-params 1M --prune-target params=2M",
            "params 2000000 contradicts pruning.target_params 1000000",
        ),
        ("--prune-gqa mqa", '--prune-gqa: expected one of kv_group, uniform, cluster, got "mqa"'),
        ("--prune-ratio 1/9", "pruning.ratio (--prune-ratio): expected pruning steps : gradient steps"),
        ("--prune-ratio 0:9", "pruning.ratio (--prune-ratio): expected pruning steps : gradient steps"),
        (
            "--prune-saliency-momentum 1",
            "pruning.saliency_momentum (--prune-saliency-momentum) must be below 1, got 1.0",
        ),
        ("--lr 0", "optimizer.lr (--lr) must be above 0, got 0.0"),
        ("--split 1,2", "data.split (--split): expected three proportions"),
        ("--split 0,1,1", "with some training"),
        ("--split nan,1,1", "data.split (--split): expected three proportions"),
        ("--context-parallel-size 2", "--context-parallel-size): context parallelism is not built; leave it at 1"),
        ("--virtual-pipeline-model-parallel-size 2", "(virtual) pipeline stages are not built; leave it at null"),
        ("--prune-groups layer.sublayer=mlp", "layer: sublayer: no stock class of transformers holds a Llama in which"),
        ("--num-experts 8", "mixture-of-experts models are not built; leave it at null"),
        ("--use-precision-aware-optimizer", "precision-aware optimizers are not built; leave it at false"),
        ("--world-size 4", "--world-size only goes with --dry-run"),
        ("--dry-run --world-size 0", "--world-size must be at least 1, got 0"),
        ("--dry-run=yes", '--dry-run is a switch and takes no value, got "yes"'),
        ("--config", "--config needs a value: text or null"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv, message):
    with pytest.raises(UserError) as caught:
        load_config(argv.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_may_stand_among_the_other_limits():
    pruning = load_config(["--prune-target", "params=2M", "flops_per_token=3M"]).pruning
    assert pruning.target_params == 2 * 10**6 and pruning.target.other_limits == {"flops_per_token": 3 * 10**6}
    assert load_config(["--prune-target", "kv_cache_per_token=64"]).pruning.enabled


@settings(deadline=None)
@given(st.integers(-(10**18), 10**18), st.sampled_from(["", "_", "e"]))
def test_whole_numbers_are_read_exactly_in_every_spelling(number, spelling):
    text = {"": str(number), "_": f"{number:_}", "e": f"{number}e0"}[spelling]
    # ddp_bucket_size and ckpt_step are whole numbers with and without the spellings of counts
    for yaml_text, section, name in (
        (f"parallel: {{ddp_bucket_size: {text}}}", "parallel", "ddp_bucket_size"),
        (f"checkpoint: {{ckpt_step: {text}}}", "checkpoint", "ckpt_step"),
    ):
        assert getattr(getattr(read_yaml(yaml_text, "x"), section), name) == number


@settings(deadline=None)
@given(st.text())
def test_any_word_gives_a_config_or_a_one_line_error(word):
    for argv in ([word], ["--seed", word], [f"--{word}", "1"], ["--prune-quantum", word], ["--prune-types", word]):
        try:
            load_config(argv)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
