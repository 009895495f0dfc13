"""What a configuration must fulfil before anything is built: pure checks, each a UserError that says how to mend it.

`check_fields` looks at each field alone (limits, refused features) and needs nothing else; `validate` also looks at
fields together and at the number of processes. What only the model can tell (layers per stage, widths against floors)
is checked where the model is known.
"""

from typing import Any

from megatron_prune.config.options import Option, all_options
from megatron_prune.config.pruning import parse_ratio
from megatron_prune.config.schema import Config
from megatron_prune.errors import UserError, one_line

LARGEST_INT, LARGEST_COUNT = 2**31 - 1, 10**18
SMALLEST_FLOAT, LARGEST_FLOAT = 1.1754944e-38, 3.4028234e38  # of float32, denormals left out


def validate(config: Config, world_size: int) -> None:
    """Check a config for a run of `world_size` processes. Raises UserError for the first thing that is wrong."""
    assert world_size >= 1, world_size
    check_fields(config)
    _check_inputs(config)
    _check_layout(config, world_size)
    _check_batch(config, world_size)
    _check_recompute(config)
    _check_schedule(config)
    _check_pruning(config)
    _check_checkpoint(config)


def check_fields(config: Config) -> None:
    """Check each field's own limits, and refuse features that are not built. Raises UserError."""
    for option in all_options(Config):
        check_option(option, getattr(getattr(config, option.section), option.name), f"{option.key} ({option.flag})")
    _check_split(config.data.split)
    target = config.pruning.target
    if (target.latency is None) != (target.latency_table is None):
        raise UserError("pruning.target: latency and latency_table go together")
    twice = target.params, config.pruning.target_params
    if twice[0] is not None:
        raise UserError("pruning.target: params {} contradicts pruning.target_params {}; give one".format(*twice))
    if config.pruning.ratio is not None:
        parse_ratio(config.pruning.ratio)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Copies of the model that `world_size` processes hold. Raises UserError when they do not come out even."""
    parallel = config.parallel
    size = parallel.model_parallel_size
    if world_size % size == 0:
        return world_size // size
    lower = world_size // size * size
    fitting = f"{lower} or {lower + size}" if lower else str(size)
    divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
    raise UserError(
        f"parallel: {world_size} processes do not divide into tensor_model_parallel_size "
        f"{parallel.tensor_model_parallel_size} x pipeline_model_parallel_size {parallel.pipeline_model_parallel_size} "
        f"= {size}; start {fitting} processes, or make that product one of {divisors}"
    )


def check_option(option: Option, value: Any, where: str) -> None:
    """Check one value against its option's limits; `where` names it in messages. Raises UserError."""
    rules = option.rules
    if rules.refused is not None and value != option.default:
        shown = "null" if option.default is None else str(option.default).lower()
        raise UserError(f"{where}: {rules.refused}; leave it at {shown}")
    named = value.items() if option.is_named else [("", value)]
    for part in option.parts:
        for name, values in named:
            place = f"{where}: {one_line(name)}: {part.name}" if name else f"{where}: {part.name}"
            check_option(part, getattr(values, part.name), place)
    if value is None:
        return
    _check_range(option, value, where)
    if rules.at_least is not None and value < rules.at_least:
        raise UserError(f"{where} must be at least {rules.at_least:g}, got {value}")
    if rules.above is not None and value <= rules.above:
        raise UserError(f"{where} must be above {rules.above:g}, got {value}")
    if rules.below is not None and value >= rules.below:
        raise UserError(f"{where} must be below {rules.below:g}, got {value}")


def _check_range(option: Option, value: Any, where: str) -> None:
    """Refuse numbers that the 32-bit numbers behind the options do not hold."""
    if option.kind is float:
        size = abs(value)
        if not size <= (option.rules.at_most or LARGEST_FLOAT):  # NaN is not, either
            raise UserError(f"{where} must be at most {option.rules.at_most or LARGEST_FLOAT:g}, got {value:g}")
        if 0 < size < SMALLEST_FLOAT:
            raise UserError(f"{where} is too small to be told from 0 in float32, got {value:g}")
    elif option.kind is int:
        limit = option.rules.at_most or (LARGEST_COUNT if option.rules.count else LARGEST_INT)
        if value > limit:
            raise UserError(f"{where} must be at most {limit}, got {value}")


def _check_inputs(config: Config) -> None:
    if config.model.hf_model is None and config.checkpoint.load is None:
        raise UserError(
            "model.hf_model (--hf-model) is not set: give the source model's folder, or checkpoint.load (--load)"
        )
    if config.model.init == "random" and config.model.hf_model is None:
        raise UserError("model.init: random needs model.hf_model (--hf-model), whose config.json gives the shape")
    if config.data.data_path is None:
        raise UserError("data.data_path (--data-path) is not set: give the prefix of a .bin/.idx data set, or a blend")
    validation_share = float(config.data.split.split(",")[1])
    if config.training.eval_interval and config.data.valid_data_path is None and validation_share == 0:
        raise UserError("training.eval_interval needs validation data: valid_data_path, or a share of it in data.split")


def _check_split(split: str) -> None:
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts) or parts[0] == 0:
        raise UserError(
            "data.split (--split): expected three proportions (training, validation, test) such as 969,30,1, with "
            f'some training, got "{one_line(split)}"'
        )


def _check_layout(config: Config, world_size: int) -> None:
    parallel, tp = config.parallel, config.parallel.tensor_model_parallel_size
    data_parallel_size(config, world_size)
    if parallel.splits_sequences and config.data.seq_length % tp:
        lower = config.data.seq_length // tp * tp
        raise UserError(
            f"data.seq_length {config.data.seq_length} is not a multiple of tensor_model_parallel_size {tp}, as "
            f"sequence_parallel needs; use {f'{lower} or ' if lower else ''}{lower + tp}, or --no-sequence-parallel"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError(
            "parallel.overlap_param_gather (--overlap-param-gather) also needs --use-distributed-optimizer and "
            "--overlap-grad-reduce"
        )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if getattr(parallel, name) is not None and parallel.pipeline_model_parallel_size == 1:
            raise UserError(f"parallel.{name} needs pipeline_model_parallel_size above 1")


def _check_batch(config: Config, world_size: int) -> None:
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    tokens = config.training.train_iters * config.tokens_per_iteration
    if tokens > LARGEST_COUNT:
        raise UserError(
            f"training.train_iters x global_batch_size x data.seq_length is {tokens:.1e} tokens, beyond what can be "
            f"counted ({LARGEST_COUNT:.0e}); give smaller ones"
        )
    copies = data_parallel_size(config, world_size)
    later = config.continued.continue_micro_batch_size or micro
    for name, size in (("micro_batch_size", micro), ("continued.continue_micro_batch_size", later)):
        if batch % (size * copies) == 0:
            continue
        lower = batch // (size * copies) * size * copies
        fitting = f"{lower} or {lower + size * copies}" if lower else str(size * copies)
        raise UserError(
            f"training.global_batch_size {batch} is not a multiple of {name} {size} x data-parallel size {copies} "
            f"({world_size} processes / {config.parallel.model_parallel_size} per model) = {size * copies}; use "
            f"{fitting}{_other_way(config, name, size, copies)}"
        )


def _other_way(config: Config, name: str, size: int, copies: int) -> str:
    """How to keep the global batch where a micro-batch of `size` on `copies` data-parallel ranks does not divide it."""
    batch = config.training.global_batch_size
    if batch % copies == 0:
        fitting = max(n for n in range(1, size + 1) if batch // copies % n == 0)
        return f", or {name} {fitting}"
    if batch % size == 0:
        return f", or start {batch // size * config.parallel.model_parallel_size} processes"
    return ""


def _check_recompute(config: Config) -> None:
    model = config.model
    details = (model.recompute_method, model.recompute_num_layers)
    if model.recompute_granularity == "full" and None in details:
        raise UserError("model.recompute_granularity: full also needs recompute_method and recompute_num_layers")
    if model.recompute_granularity != "full" and details != (None, None):
        raise UserError("model.recompute_method and recompute_num_layers only go with recompute_granularity: full")


def _check_schedule(config: Config) -> None:
    optimizer, continued = config.optimizer, config.continued
    decay_iters = optimizer.lr_decay_iters or config.training.train_iters
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}")
    if optimizer.lr_warmup_iters >= decay_iters:
        raise UserError(
            f"optimizer.lr_warmup_iters {optimizer.lr_warmup_iters} must be below {decay_iters}, where the decay ends "
            "(lr_decay_iters, else train_iters)"
        )
    if optimizer.lr_decay_style == "WSD" and not 1 <= (optimizer.lr_wsd_decay_iters or 0) <= decay_iters:
        raise UserError(
            f"optimizer.lr_decay_style: WSD needs lr_wsd_decay_iters between 1 and {decay_iters}, got "
            f"{optimizer.lr_wsd_decay_iters or 'null'}"
        )
    if config.is_one_schedule and continued.has_schedule:
        raise UserError(
            "continued: with optimizer.lr_schedule: whole_run the run is training.train_iters long, with one schedule "
            "of the learning rate; leave the section's other fields out"
        )
    if continued.continue_tokens == 0:
        return
    peak = optimizer.lr if continued.continue_lr is None else continued.continue_lr
    if continued.continue_min_lr > peak:
        raise UserError(f"continued.continue_min_lr {continued.continue_min_lr:g} is above the peak rate {peak:g}")
    if continued.continue_lr_warmup_iters >= config.continue_iters:
        raise UserError(
            f"continued.continue_lr_warmup_iters {continued.continue_lr_warmup_iters} must be below the "
            f"{config.continue_iters} iterations that continue_tokens {continued.continue_tokens} make"
        )


def check_head_score(config: Config) -> None:
    """Raise UserError if a head's score would be divided twice: by its columns and by its parameters."""
    pruning = config.pruning
    if pruning.head_score == "per_column" and pruning.normalize == "per_parameter":
        raise UserError(
            "pruning.head_score: per_column divides a head's score by its columns, and normalize: per_parameter "
            "divides it once more; use head_score: sum, or (the paper's scores) normalize: none"
        )


def _check_curve(config: Config) -> None:
    pruning, run_tokens = config.pruning, config.training.train_iters * config.tokens_per_iteration
    start, end = config.curve_tokens
    if not start < end <= run_tokens:
        raise UserError(
            f"pruning.curve: start {start} and end {end} (tokens) must follow each other within the {run_tokens} "
            "tokens of training.train_iters"
        )
    if pruning.first_prune_iter:
        raise UserError("pruning.first_prune_iter belongs to schedule: ratio; a curve begins at pruning.curve: start")
    if pruning.ratio is not None:
        raise UserError(f"pruning.ratio {pruning.ratio} belongs to schedule: ratio, and schedule says curve; drop one")


def _check_pruning(config: Config) -> None:
    pruning = config.pruning
    if config.checkpoint.load is None:  # a run that began so may go on so, which is seen when it is opened
        check_head_score(config)
    if pruning.enabled and pruning.follows_curve and not pruning.replay:
        _check_curve(config)
    if config.distillation.teacher_tokens:
        if config.distillation.teacher != "source" or not config.distillation.weight:
            raise UserError(
                "distillation.teacher_tokens trains the source, and needs a weight above 0 and teacher: source"
            )
        if config.checkpoint.save is None:
            raise UserError("distillation.teacher_tokens needs checkpoint.save (--save), where the teacher is kept")
    if config.replay_tokens is not None and not pruning.replay:
        raise UserError("pruning.replay_end belongs to pruning.replay, which is not set")
    if pruning.replay is not None and pruning.target.other_limits:
        raise UserError("pruning.replay ends at a number of parameters: pruning.target may only have params with it")
    if pruning.replay is not None and (not pruning.enabled or not pruning.follows_curve):
        raise UserError(
            "pruning.replay needs pruning.target_params, the size at which it ends, and no ratio: its removals have "
            "their own times"
        )
    if pruning.enabled and pruning.optimizer_state == "reset" and pruning.fisher == "adam":
        raise UserError(
            "pruning.fisher: adam reads the second moments that pruning.optimizer_state: reset throws away; use "
            "fisher: microbatch, or optimizer_state: carry"
        )
    if pruning.enabled and pruning.first_prune_iter >= config.training.train_iters:
        raise UserError(
            f"pruning.first_prune_iter {pruning.first_prune_iter} must be below training.train_iters "
            f"{config.training.train_iters}, which ends the pruning phase"
        )
    if config.continued.continue_tokens and not pruning.enabled:
        raise UserError(
            "continued.continue_tokens (--continue-tokens) counts from reaching pruning.target_params, which is not "
            "set; use training.train_iters for plain training"
        )


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    needed = {
        "save": ("save_interval", "save_retain_interval", "keep_last", "async_save"),
        "load": ("ckpt_step", "finetune", "no_load_optim", "allow_blend_change"),
    }
    for folder, names in needed.items():
        given = [name for name in names if getattr(checkpoint, name) not in (None, False)]
        if given and getattr(checkpoint, folder) is None:
            raise UserError(f"checkpoint.{given[0]} needs checkpoint.{folder} (--{folder}), which is not set")
    interval, retain = checkpoint.save_interval, checkpoint.save_retain_interval
    if retain is not None and (interval is None or retain % interval):
        raise UserError(f"checkpoint.save_retain_interval {retain} must be a multiple of save_interval {interval}")
