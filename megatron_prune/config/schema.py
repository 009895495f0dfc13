"""The configuration: one frozen dataclass per section, and `Config` that holds them all.

Names are Megatron-LM's where it has one. A field called `some_name` is the YAML key `some_name` in its section and the
flag `--some-name` (`--no-some-name` turns a switch off); names are unique over all sections. Paths stay as given, so
relative ones count from the directory in which the run starts. null means "not set" and is said in the help of each
field. Fields that only exist to be refused say so: nobody has built that feature here yet.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_prune.config.options import option
from megatron_prune.config.pruning import ContinuedConfig, DistillationConfig, PruningConfig, parse_span


@dataclass(frozen=True)
class ModelConfig:
    """The source model and how its layers compute."""

    hf_model: str | None = option(None, "Hugging Face folder of the source model; null: everything comes from load")
    init: Literal["source", "random"] = option(
        "source", "source: the weights in hf_model; random: only its config.json is read and weights are drawn"
    )
    architecture: str | None = option(
        None,
        "an architecture.json, as checkpoints have it: begin with its units of hf_model alone (with init: random, its "
        "shape from scratch); null: with all of them",
    )
    make_vocab_size_divisible_by: int = option(
        128, "the stored vocabulary is padded to a multiple of this times the tensor-parallel size", at_least=1
    )
    engine: Literal["auto", "gpt", "hybrid"] = option(
        "auto",
        "class of megatron-core that carries it: GPTModel, HybridModel, or the newest that is there; same results",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "kernels that torch.compile makes in the first steps; on: norms, RoPE, SwiGLU and (bf16) the loss; auto: on a "
        "GPU those without sums, with which a resumed run stays the same to the bit",
    )
    attention_backend: Literal["sdpa"] = option("sdpa", "core attention: torch's scaled_dot_product_attention")
    recompute_granularity: Literal["selective", "full"] | None = option(
        None, "recompute activations in the backward pass: of the core attention, or of whole layers"
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "with full: recompute all layers in chunks, or only the first ones of each stage"
    )
    recompute_num_layers: int | None = option(
        None, "with full: layers per chunk (uniform), or layers recomputed per stage (block)", at_least=1
    )
    num_experts: int | None = option(None, "experts per layer", refused="mixture-of-experts models are not built")


@dataclass(frozen=True)
class ParallelConfig:
    """Which process holds what: the axes of the device mesh, and how gradients and weights travel on it."""

    tensor_model_parallel_size: int = option(1, "processes that share every layer's weights", at_least=1)
    pipeline_model_parallel_size: int = option(1, "pipeline stages", at_least=1)
    sequence_parallel: bool = option(
        False, "split activations between the layers over the tensor-parallel processes; ignored when there is one"
    )
    use_distributed_optimizer: bool = option(False, "shard optimizer state and main weights over data parallelism")
    overlap_grad_reduce: bool = option(False, "reduce gradients while the backward pass still runs")
    overlap_param_gather: bool = option(
        False, "gather stepped weights during the next forward pass (needs the two options above)"
    )
    num_layers_in_first_pipeline_stage: int | None = option(
        None, "layers of the first stage, when stages are uneven; null: even", at_least=1
    )
    num_layers_in_last_pipeline_stage: int | None = option(
        None, "layers of the last stage, when stages are uneven; null: even", at_least=1
    )
    context_parallel_size: int = option(1, "processes per sequence", refused="context parallelism is not built")
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "model chunks per pipeline stage", refused="interleaved (virtual) pipeline stages are not built"
    )
    expert_model_parallel_size: int = option(
        1, "processes that share the experts", refused="mixture-of-experts models are not built"
    )
    ddp_bucket_size: int | None = option(
        None, "parameters per gradient bucket; null: megatron-core's own choice", at_least=1, count=True
    )
    distributed_timeout_minutes: float = option(
        10, "a collective that hangs longer than this ends the run", above=0, at_most=525_600
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto: CUDA and NCCL if there is a GPU, else CPU and gloo")

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model: tensor times pipeline parallel size."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def splits_sequences(self) -> bool:
        """Whether sequence parallelism is really on: asked for, and more than one tensor-parallel process."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1


@dataclass(frozen=True)
class DataConfig:
    """Indexed data sets (.bin/.idx prefixes), their blend, and the tokenizer that made them."""

    data_path: str | None = option(
        None, 'prefix of a data set, or a blend "weight1 prefix1 weight2 prefix2"', several_words=True
    )
    valid_data_path: str | None = option(
        None, "data set or blend for validation; null: what split leaves of data_path", several_words=True
    )
    split: str = option("969,30,1", "shares of training, validation and test in data_path; unused with valid_data_path")
    tokenizer_type: str | None = option(None, "kind of tokenizer, in Megatron's words; null: seen from tokenizer_model")
    tokenizer_model: str | None = option(None, "file or folder of the tokenizer; null: the one in hf_model")
    seq_length: int = option(2048, "tokens per training sequence", at_least=1)
    data_cache_path: str | None = option(None, "folder for the data sets' index caches; null: beside the data")
    eod_mask_loss: bool = option(False, "leave predictions made at end-of-document tokens out of the loss")


@dataclass(frozen=True)
class TrainingConfig:
    """Batches, length of the run, evaluation, and when to stop."""

    micro_batch_size: int = option(1, "sequences per forward pass on one process", at_least=1)
    global_batch_size: int = option(8, "sequences per optimizer step over all processes", at_least=1)
    train_iters: int = option(
        1000,
        "iterations of plain training, of the pruning phase at most, or (lr_schedule: whole_run) of all",
        at_least=1,
    )
    seed: int = option(1234, "seed of initialisation, data order and random criteria", at_least=1, at_most=2**32 - 1)
    bf16: bool = option(False, "compute in bfloat16 with float32 main weights; off: float32")
    eval_interval: int = option(0, "iterations between evaluations on validation data; 0: never", at_least=0)
    eval_iters: int = option(10, "global batches per evaluation", at_least=1)
    exit_interval: int | None = option(
        None, "stop at an iteration that is a multiple of this; schedules do not change; null: never", at_least=1
    )
    exit_duration_in_mins: int | None = option(None, "save and stop after this many minutes; null: never", at_least=1)
    exit_at_target: bool = option(
        False, "stop when pruning.target_params is reached; the same run without this goes on with continue_tokens"
    )
    max_nonfinite_steps: int = option(3, "stop after this many losses in a row that are NaN or infinite", at_least=1)
    check_invariants: bool = option(
        False, "after every step, check that retired units are zero and parameters are counted right (slow)"
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning rate until the target is reached (see `continued` for what follows)."""

    optimizer: str = option(
        "adam", "which one", refused="only adam is built: what others (muon, lion, sgd, ...) keep is not saved here"
    )
    lr: float = option(3e-4, "peak learning rate", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD", "inverse-square-root"] = option(
        "cosine", "shape of the learning rate after the warm-up"
    )
    lr_schedule: Literal["phases", "whole_run"] | None = option(
        None,
        "phases: this one until the target is reached, then `continued`'s; whole_run: this one over "
        "training.train_iters, which then is the length of the whole run; null: whole_run where pruning follows a "
        "curve and continue_tokens is 0",
    )
    lr_warmup_iters: int = option(0, "iterations of linear warm-up", at_least=0)
    lr_decay_iters: int | None = option(None, "iteration at which min_lr is reached; null: train_iters", at_least=1)
    lr_wsd_decay_iters: int | None = option(None, "with WSD: iterations of the final decay", at_least=1)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = option(
        "exponential", "with WSD: shape of the final decay"
    )
    weight_decay: float = option(0.1, "decoupled weight decay; norms have none", at_least=0)
    adam_beta1: float = option(0.9, "decay of Adam's first moment", at_least=0, below=1)
    adam_beta2: float = option(0.95, "decay of Adam's second moment", at_least=0, below=1)
    adam_eps: float = option(1e-8, "added to the root of Adam's second moment", above=0)
    clip_grad: float = option(1.0, "largest global gradient norm; 0: no clipping", at_least=0)
    use_precision_aware_optimizer: bool = option(
        False, "optimizer state in low precision", refused="precision-aware optimizers are not built"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run is written, how often, and what it starts from."""

    save: str | None = option(None, "folder for checkpoints, history and effective config; null: nothing is written")
    save_interval: int | None = option(None, "iterations between checkpoints; null: when the run stops", at_least=1)
    save_retain_interval: int | None = option(
        None, "checkpoints at multiples of this iteration are kept for good, older others are deleted", at_least=1
    )
    keep_last: int | None = option(
        None, "newest checkpoints to keep beside those; null: all, or one with save_retain_interval", at_least=1
    )
    async_save: bool = option(False, "write checkpoints in the background")
    on_save_error: Literal["continue", "stop"] = option(
        "continue", "a checkpoint cannot be written (disk full): say so and train on, or stop; older ones stay"
    )
    load: str | None = option(None, "folder to resume from; null: start from hf_model")
    ckpt_step: int | None = option(None, "iteration to load; null: the latest complete one", at_least=0)
    finetune: bool = option(False, "take only the weights from load, and start at iteration 0 with a new optimizer")
    no_load_optim: bool = option(False, "resume without the optimizer's state")
    allow_blend_change: bool = option(
        False, "resume on other data, weights, split, seq_length or seed than the checkpoint was trained with"
    )


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and recorded while the run goes on."""

    log_interval: int = option(10, "iterations between log lines and scalars", at_least=1)
    tensorboard_dir: str | None = option(None, "folder for TensorBoard; null: `tensorboard` in save")
    prometheus_file: str | None = option(
        None,
        "file in Prometheus' text format (NAME.prom in node-exporter's textfile folder), replaced at every log line; "
        "null: `metrics.prom` in save",
    )
    wandb_project: str | None = option(None, "Weights & Biases project; null: not used")
    report: bool = option(True, "write `report.html` into save when the run ends, where plotly is installed")
    log_throughput: bool = option(True, "report tokens per second, TFLOP/s per device and MFU")
    peak_tflops: float | None = option(
        None,
        "dense peak of one device in TFLOP/s, which MFU is a share of; null: known GPUs' bf16 peak, else no MFU",
        above=0,
    )
    progress: Literal["auto", "dashboard", "bar", "lines"] = option(
        "auto", "auto: a dashboard on a terminal, plain lines elsewhere"
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """What the launcher's `evaluate` stage measures source and pruned model on; training itself reads none of it."""

    eval_data_path: str | None = option(
        None, "data sets or text files for perplexity, or a blend; null: valid_data_path", several_words=True
    )
    eval_tasks: str | None = option(None, "zero-shot tasks, separated by commas; null: none")
    eval_task_data: str | None = option(None, "folder with the tasks' data, for machines without network")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run. Checked against the number of processes by `validation.validate`."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    pruning: PruningConfig = PruningConfig()
    distillation: DistillationConfig = DistillationConfig()
    continued: ContinuedConfig = ContinuedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def settled(self) -> "Config":
        """The same in one way of saying it; see `PruningConfig.settled`."""
        return replace(self, pruning=self.pruning.settled)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens that one optimizer step consumes."""
        return self.training.global_batch_size * self.data.seq_length

    @property
    def continue_iters(self) -> int:
        """Iterations of the continued phase: `continue_tokens`, rounded up to whole iterations."""
        return -(-self.continued.continue_tokens // self.tokens_per_iteration)

    @property
    def is_one_schedule(self) -> bool:
        """Whether training.train_iters is the length of the whole run, not of its first phase at most."""
        if self.optimizer.lr_schedule is not None:
            return self.optimizer.lr_schedule == "whole_run"
        return self.pruning.enabled and self.pruning.follows_curve and not self.continued.continue_tokens

    @property
    def after_target(self) -> "Config":
        """The same, with `continued`'s micro-batch size and recomputation in the place of the others."""
        size, recompute = self.continued.continue_micro_batch_size, self.continued.continue_recompute_granularity
        config = self
        if size is not None:
            config = replace(config, training=replace(self.training, micro_batch_size=size))
        if recompute is not None:
            plain = replace(self.model, recompute_granularity=None, recompute_method=None, recompute_num_layers=None)
            wanted = plain if recompute == "none" else replace(plain, recompute_granularity=recompute)
            config = replace(config, model=wanted)
        return config

    @property
    def replay_tokens(self) -> int | None:
        """pruning.replay_end in tokens. Raises UserError if it is not spelled so."""
        end, run_tokens = self.pruning.replay_end, self.training.train_iters * self.tokens_per_iteration
        return None if end is None else parse_span(end, "pruning.replay_end (--prune-replay-end)", run_tokens)

    @property
    def curve_tokens(self) -> tuple[int, int]:
        """(start, end) of pruning.curve in tokens. Raises UserError if they are not spelled so."""
        curve, run_tokens = self.pruning.curve, self.training.train_iters * self.tokens_per_iteration
        start, end = (
            parse_span(getattr(curve, name), f"pruning.curve: {name}", run_tokens) for name in ("start", "end")
        )
        return start, end
