"""What to prune, how fast and by which score (`pruning`), what is learnt from a teacher (`distillation`), and what
comes after the target (`continued`).

The defaults of `pruning` are what measured best on small real models (docs/method.md): whole KV heads as the unit,
the curvature's part of the predicted loss per removed
parameter, smoothed over steps, kinds in balance, a cubic curve over the first fifth of the
run. The settings of the paper (EfficientLLM, arXiv 2502.06663) are in its recipes under `examples/configs/`.

Kinds of groups: `head` removes one query head (or, by `gqa`, a whole KV head) in every layer, `ffn` one channel of the
FFN's intermediate activation in every layer, `stem` one channel of the residual stream (hidden size) everywhere,
`layer` (not among the default types) a whole layer.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_prune.config.options import NamedParts, option
from megatron_prune.config.values import whole_number
from megatron_prune.errors import UserError, one_line

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root"]


def parse_ratio(text: str) -> tuple[int, int]:
    """(pruning steps, gradient steps) of a ratio such as "1:9". Raises UserError unless both are whole numbers >= 1."""
    match = re.fullmatch(r"([1-9][0-9]{0,5}):([1-9][0-9]{0,5})", text)
    if match is None:
        raise UserError(
            "pruning.ratio (--prune-ratio): expected pruning steps : gradient steps, such as 4:1 or 1:9, got "
            f'"{one_line(text)}"'
        )
    return int(match[1]), int(match[2])


def parse_span(text: str, where: str, run_tokens: int) -> int:
    """Tokens that `text` spells: a count such as 5B, or a share of `run_tokens` such as 20%. Raises UserError: it is
    neither; names `where` it stands."""
    share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text)
    if share and float(share[1]) <= 100:
        return round(float(share[1]) / 100 * run_tokens)
    tokens = whole_number(text, suffixes=True)
    if share or tokens is None or tokens < 0:
        raise UserError(
            f'{where}: expected tokens, such as 5B, or a share of the run, such as 20%, got "{one_line(text)}"'
        )
    return tokens


@dataclass(frozen=True)
class Target:
    """What the pruned model may cost; all limits hold at once."""

    params: int | None = option(None, "parameters, as target_params", at_least=1, count=True)
    flops_per_token: int | None = option(
        None, "FLOPs of a forward pass over data.seq_length tokens, per token", at_least=1, count=True
    )
    kv_cache_per_token: int | None = option(
        None, "elements of the KV cache per token, keys and values of all layers", at_least=1
    )
    latency: float | None = option(None, "milliseconds, by latency_table", above=0)
    latency_table: str | None = option(None, "file that megatron-prune measure-latency wrote")

    @property
    def other_limits(self) -> dict[str, float]:
        """The limits that are set, but for that of the parameters."""
        names = ("flops_per_token", "kv_cache_per_token", "latency")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Curve:
    """Size over tokens, from the source's to the target's. Each end is tokens, or a share of training.train_iters."""

    shape: Literal["cubic", "linear"] = option("cubic", "cubic: fast first, slow last; or linear")
    start: str = option("0%", "where it begins: tokens (5B) or a share of training.train_iters (10%)")
    end: str = option("20%", "where the target is reached")


@dataclass(frozen=True)
class GroupConfig:
    """Options of one kind of group."""

    cost: int | None = option(
        None,
        "with schedule: ratio, pruning steps that one group uses up; null: the kind's own (kv_channels for head, else "
        "1)",
        at_least=1,
    )
    floor: int = option(1, "units that every layer keeps", at_least=1)
    limit: int | None = option(
        None, "groups that may leave by one iteration's scores; null: the kind's own (1 for head, else any)", at_least=1
    )
    quantum: int | None = option(
        None,
        "multiple to which each rank rounds its *stored* width up; changes memory and speed, never the results; null: "
        "64 for FFN and stem channels of which a rank holds 512 or more in the source, else 1",
        at_least=1,
    )
    round_to: int | None = option(
        None,
        "multiple to which the *live* width is brought at the end of pruning, by removing the least salient rest; "
        "null: what runtimes like, for FFN and stem channels that may leave: 8, or 16 to 64 where that is at most a "
        "128th of the source's (1 where that has less than 512); 1: the width that the target gives",
        at_least=1,
    )
    score: str = option(
        "weights",
        "what groups of the kind are ordered by: weights, pruning.metric summed over them; for layer also "
        "block_influence, 1 - cosine of its input and output",
        metavar="NAME",
    )
    sublayer: Literal["attention", "mlp"] | None = option(
        None,
        "a part of a layer that leaves alone",
        refused="no stock class of transformers holds a Llama in which a layer lacks attention or MLP, so no export "
        "could say it; whole layers, heads and FFN channels can leave",
    )


class GroupConfigs(NamedParts):
    """Options by name of the kind of group (see `pruning.groups`); kinds not named have the defaults."""

    part = GroupConfig


# What these keys were called before every kind of group had a section: (field, kind or key -> kind).
MOVED: dict[str, tuple[str, str | dict[str, str]]] = {
    "min_heads": ("floor", "head"),
    "min_ffn": ("floor", "ffn"),
    "min_hidden": ("floor", "stem"),
    "group_cost": ("cost", {"head": "head", "ffn": "ffn", "stem": "stem"}),
    "quantum": ("quantum", {"head": "head", "ffn": "ffn", "stem": "stem"}),
    "round_widths": ("round_to", {"ffn": "ffn", "hidden": "stem"}),
}


@dataclass(frozen=True)
class SecondOrder:
    """The second-order weight update before a removal (EfficientLLM-B), and the Hessians it shares with metric obc."""

    enabled: bool = option(False, "before a group leaves, the weights beside it take over what they can of its work")
    stem: bool = option(True, "also before a stem channel leaves (qkv, gate/up and an untied LM head)")
    damping: float = option(0.01, "added to the Hessian's diagonal, relative to its mean", above=0)
    calibration_tokens: int = option(
        32768,
        "tokens of the iteration's own batch that a Hessian is made from, rounded up to whole micro-batches per rank",
        at_least=1,
        count=True,
    )
    refresh: int = option(1, "removals after which metric obc computes its Hessians anew", at_least=1)


@dataclass(frozen=True)
class SpikeGuardConfig:
    """When pruning pauses because the loss has jumped."""

    factor: float | None = option(
        None, "pruning pauses while the loss is above this times its recent median; null: never", above=1
    )
    window: int = option(20, "losses that the median is taken of", at_least=1)


@dataclass(frozen=True)
class PruningConfig:
    """Which groups leave, when, and by which score. All flags of this section begin with --prune-."""

    flag_prefix: ClassVar[str] = "prune-"

    target_params: int | None = option(
        None,
        "pruning ends at the first step with no more parameters than this; null: no pruning, unless target says more",
        at_least=1,
        count=True,
    )
    target: Target = option(
        Target(), "limits that the pruned model keeps; groups are compared per unit of the one that is exceeded most"
    )
    schedule: Literal["ratio", "curve"] | None = option(
        None,
        "when groups leave: by the `curve` of sizes over tokens, or `ratio` of pruning steps to gradient steps; null: "
        "ratio where one is given, else curve",
    )
    ratio: str | None = option(
        None, "with schedule: ratio, pruning steps : gradient steps, such as 4:1 or 1:9; null: 1:1 there"
    )
    first_prune_iter: int = option(
        0, "with schedule: ratio, iteration from which gradient steps count toward pruning steps", at_least=0
    )
    balance: float = option(
        0.6,
        "share of its proportional width (the one it would have if all kinds shrank by the same factor) that a kind "
        "keeps while another kind has more to lose; 0: scores alone decide between kinds",
        at_least=0,
        at_most=1,
    )
    curve: Curve = option(Curve(), "with schedule: curve, the size that the model may have, over tokens")
    types: tuple[str, ...] = option(
        ("head", "ffn", "stem"), "kinds of groups that may be removed, by name", metavar="NAME", unique=True
    )
    metric: str = option(
        "obd",
        "element-wise saliency criterion by its registered name: taylor_first, taylor_second, taylor_mix, "
        "taylor_signed, obd, obc, wanda, flap, minitron, magnitude, random",
    )
    fisher: Literal["microbatch", "adam", "batch"] = option(
        "microbatch",
        "source of squared gradients: each micro-batch's own gradient, Adam's second moment, or the reduced gradient",
    )
    fisher_unit: Literal["sequence", "token"] = option(
        "token", "what one sample of the Fisher information is (with fisher: microbatch)"
    )
    head_score: Literal["per_column", "sum"] = option(
        "sum", "score of a head: the plain sum, or (the paper's, with normalize: none) divided by the columns it owns"
    )
    normalize: Literal["none", "per_parameter"] = option(
        "per_parameter",
        "divide a group's score by the parameters it removes (or what it saves of another limit of target that binds), "
        "or compare the scores as they are",
    )
    saliency_momentum: float = option(
        0.9, "exponential smoothing of unit scores over pruning steps; 0: none", at_least=0, below=1
    )
    gqa: Literal["kv_group", "uniform", "cluster"] = option(
        "kv_group",
        "unit of a head group under grouped-query attention: a KV head with all its queries, one query head of each KV "
        "head together, or single query heads (the paper's cluster attention)",
    )
    groups: GroupConfigs = option(
        GroupConfigs(head=GroupConfig(), ffn=GroupConfig(), stem=GroupConfig()), "options of each kind of group"
    )
    finish: Literal["exact", "first"] = option(
        "exact",
        "exact: avoid groups that would end more than 0.5 percent below the target, and where all would, take the one "
        "nearest to it; first: always the least salient",
    )
    second_order: SecondOrder = option(
        SecondOrder(), "second-order weight update before each removal, and the Hessians of metric obc"
    )
    optimizer_state: Literal["carry", "reset"] = option(
        "carry",
        "Adam's state of what stays, after an iteration in which groups left: goes on, or moments and step count begin "
        "anew",
    )
    spike_guard: SpikeGuardConfig = option(SpikeGuardConfig(), "pause after a jump of the loss until it is back")
    replay: str | None = option(
        None,
        "a pruning_history.jsonl, or a recipe's .json, whose removals are repeated, at the recorded tokens, instead of "
        "scored",
    )
    replay_end: str | None = option(
        None,
        "with replay, where the last group leaves, and the others in proportion: tokens (5B) or a share of "
        "training.train_iters (20%)",
    )

    @property
    def enabled(self) -> bool:
        """Whether this run removes anything at all."""
        return self.settled.target_params is not None or bool(self.target.other_limits)

    @property
    def settled(self) -> "PruningConfig":
        """The same with `target: params` as `target_params`; where the two differ, which is refused when it is checked,
        as it is."""
        params = self.target.params
        if params is None or self.target_params not in (None, params):
            return self
        return dataclasses.replace(self, target_params=params, target=dataclasses.replace(self.target, params=None))

    @property
    def ratio_steps(self) -> tuple[int, int]:
        """(pruning steps, gradient steps) of one cycle; see `parse_ratio`."""
        return parse_ratio(self.ratio or "1:1")

    @property
    def follows_curve(self) -> bool:
        """Whether groups leave by the curve, not by a ratio."""
        return self.schedule == "curve" or (self.schedule is None and self.ratio is None)


@dataclass(frozen=True)
class DistillationConfig:
    """What is learnt from a teacher's logits. All flags of this section begin with --distill-."""

    flag_prefix: ClassVar[str] = "distill-"

    weight: float = option(
        0.0,
        "loss = (1 - weight) x cross entropy + weight x T^2 x KL(teacher || student); 0: no teacher",
        at_least=0,
        at_most=1,
    )
    temperature: float = option(1.0, "T, of both distributions", above=0)
    teacher: str = option(
        "source", "`source`: the model in model.hf_model; or a Hugging Face folder, or a run's folder of checkpoints"
    )
    teacher_tokens: int = option(
        0,
        "with teacher: source, tokens that it is trained on first, in SAVE/teacher, so that it knows the corpus; 0: it "
        "teaches as it is",
        at_least=0,
        count=True,
    )
    scores: Literal["distilled", "cross_entropy"] = option(
        "distilled",
        "gradients that groups are scored by: those of the distilled loss; or iterations that score train on cross "
        "entropy alone",
    )


@dataclass(frozen=True)
class ContinuedConfig:
    """Training of the small model, counted from the step that reached the target, with a schedule of its own."""

    continue_tokens: int = option(0, "tokens to train after reaching the target; 0: stop there", at_least=0, count=True)
    continue_lr: float | None = option(None, "peak learning rate; null: optimizer.lr", above=0)
    continue_min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    continue_lr_warmup_iters: int = option(0, "iterations of linear warm-up", at_least=0)
    continue_lr_decay_style: DecayStyle = option("cosine", "shape of the decay over continue_tokens")
    continue_micro_batch_size: int | None = option(
        None, "training.micro_batch_size from the target on, where more fits; null: the same", at_least=1
    )
    continue_recompute_granularity: Literal["none", "selective"] | None = option(
        None, "model.recompute_granularity from the target on, where less is needed; null: the same"
    )

    @property
    def has_schedule(self) -> bool:
        """Whether anything is said about learning rate or length."""
        return ContinuedConfig() != dataclasses.replace(
            self, continue_micro_batch_size=None, continue_recompute_granularity=None
        )
