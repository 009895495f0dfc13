"""Checks over several fields and the number of processes: what passes, and what an error proposes instead."""

import pytest

from megatron_prune.config import Config, ParallelConfig, data_parallel_size, load_config, validate
from megatron_prune.errors import UserError

INPUTS = ["--hf-model", "model", "--data-path", "text"]


def config_of(flags: str) -> Config:
    return load_config([*INPUTS, *flags.split()])


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --global-batch-size 6", 4),
        ("--sequence-parallel --seq-length 7", 1),
        ("--tensor-model-parallel-size 3 --sequence-parallel --seq-length 9", 3),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
        ("--recompute-granularity selective", 1),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", 1),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 100", 1),
        ("--prune-target-params 1M --continue-tokens 1M --continue-lr-warmup-iters 10", 1),
        ("--save out --save-interval 10 --save-retain-interval 50 --keep-last 2 --async-save", 1),
        ("--load out --ckpt-step 10 --finetune", 1),
        ("--init random", 1),
        ("--eval-interval 5", 1),
        ("--eval-interval 5 --split 1,0,0 --valid-data-path v", 1),
    ],
)
def test_good_configurations_pass(flags, world_size):
    validate(config_of(flags), world_size)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        (
            "--tensor-model-parallel-size 4",
            6,
            "6 processes do not divide into tensor_model_parallel_size 4 x pipeline_model_parallel_size 1 = 4; "
            "start 4 or 8 processes, or make that product one of 1, 2, 3, 6",
        ),
        ("--pipeline-model-parallel-size 4", 2, "start 4 processes, or make that product one of 1, 2"),
        (
            "--global-batch-size 10 --micro-batch-size 2 --tensor-model-parallel-size 2",
            4,
            "training.global_batch_size 10 is not a multiple of micro_batch_size 2 x data-parallel size 2 "
            "(4 processes / 2 per model) = 4; use 8 or 12, or micro_batch_size 1",
        ),
        ("--global-batch-size 2", 4, "= 4; use 4, or start 2 processes"),
        (
            "--tensor-model-parallel-size 3 --sequence-parallel --seq-length 8",
            3,
            "data.seq_length 8 is not a multiple of tensor_model_parallel_size 3, as sequence_parallel needs; "
            "use 6 or 9, or --no-sequence-parallel",
        ),
        ("--overlap-param-gather --overlap-grad-reduce", 1, "also needs --use-distributed-optimizer"),
        ("--num-layers-in-first-pipeline-stage 2", 1, "needs pipeline_model_parallel_size above 1"),
        ("--recompute-granularity full", 1, "full also needs recompute_method and recompute_num_layers"),
        ("--recompute-granularity selective --recompute-num-layers 2", 1, "only go with recompute_granularity: full"),
        ("--min-lr 1", 1, "optimizer.min_lr 1 is above optimizer.lr 0.0003"),
        ("--train-iters 10 --lr-warmup-iters 10", 1, "optimizer.lr_warmup_iters 10 must be below 10"),
        ("--lr-decay-style WSD", 1, "WSD needs lr_wsd_decay_iters between 1 and 1000, got null"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 2000", 1, "between 1 and 1000, got 2000"),
        (
            "--prune-target-params 1M --prune-ratio 1:1 --train-iters 5 --prune-first-prune-iter 5",
            1,
            "first_prune_iter 5 must be below",
        ),
        (
            "--prune-target-params 1M --prune-fisher adam --prune-optimizer-state reset",
            1,
            "pruning.fisher: adam reads the second moments that pruning.optimizer_state: reset throws away",
        ),
        ("--continue-tokens 1M", 1, "counts from reaching pruning.target_params, which is not set"),
        (
            "--prune-target-params 1M --continue-tokens 20000 --continue-lr-warmup-iters 2",
            1,
            "must be below the 2 iterations that continue_tokens 20000 make",
        ),
        (
            "--prune-target-params 1M --continue-tokens 1M --continue-min-lr 1",
            1,
            "continue_min_lr 1 is above the peak rate",
        ),
        ("--save-interval 5", 1, "checkpoint.save_interval needs checkpoint.save (--save), which is not set"),
        ("--finetune", 1, "checkpoint.finetune needs checkpoint.load (--load), which is not set"),
        ("--save x --save-interval 20 --save-retain-interval 50", 1, "50 must be a multiple of save_interval 20"),
        ("--hf-model null", 1, "model.hf_model (--hf-model) is not set"),
        ("--hf-model null --load x --init random", 1, "init: random needs model.hf_model"),
        ("--data-path null", 1, "data.data_path (--data-path) is not set"),
        ("--eval-interval 5 --split 1,0,0", 1, "training.eval_interval needs validation data"),
    ],
)
def test_impossible_configurations_say_what_would_fit(flags, world_size, message):
    config = config_of(flags)
    with pytest.raises(UserError) as caught:
        validate(config, world_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_an_error_proposes_is_accepted():
    for batch in (8, 12):
        validate(config_of(f"--global-batch-size {batch} --micro-batch-size 2 --tensor-model-parallel-size 2"), 4)
    for world_size in (4, 8):
        validate(config_of("--tensor-model-parallel-size 4"), world_size)


def test_limits_also_hold_for_configs_built_in_code():
    with pytest.raises(UserError, match=r"tensor_model_parallel_size .* must be at least 1, got 0"):
        validate(Config(parallel=ParallelConfig(tensor_model_parallel_size=0)), 1)


def test_derived_numbers():
    config = config_of(
        "--seq-length 100 --global-batch-size 4 --continue-tokens 1001 --prune-target-params 5 --prune-ratio 4:1 "
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3"
    )
    assert config.tokens_per_iteration == 400 and config.continue_iters == 3
    assert config.pruning.ratio_steps == (4, 1) and config.pruning.enabled and not Config().pruning.enabled
    assert data_parallel_size(config, 12) == 2
    assert not load_config(["--sequence-parallel"]).parallel.splits_sequences
