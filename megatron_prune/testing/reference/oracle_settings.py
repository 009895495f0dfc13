"""What a run of the dense oracle does: one frozen value, checked when it is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_prune.errors import UserError
from megatron_prune.testing.reference import oracle_scores

_CHOICES = {
    "criterion": oracle_scores.CRITERIA + oracle_scores.INPUT_CRITERIA,
    "fisher": ("microbatch", "adam", "batch"),
    "fisher_unit": ("sequence", "token"),
    "head_score": ("per_column", "sum"),
    "normalize": ("none", "per_parameter"),
    "layer_score": ("weights", "block_influence"),
    "gqa": ("cluster", "uniform", "kv_group"),
    "finish": ("exact", "any"),
    "schedule": ("ratio", "cubic", "linear"),
    "optimizer_state": ("carry", "reset"),
    "distilled_scores": ("distilled", "cross_entropy"),
}


@dataclass(frozen=True)
class LinearDecay:
    """A learning rate that falls from `peak` to 0 over so many iterations."""

    peak: float
    iterations: int

    def __call__(self, before: int) -> float:
        return self.peak * (1 - before / self.iterations)


@dataclass(frozen=True)
class OracleSettings:
    """What a run does; the defaults of the pruning fields are the project's.

    Args:
        lr: learning rate of an iteration, from the number of iterations before it (0 for the first), or a constant.
        betas, eps, weight_decay: AdamW; decay is decoupled and on tensors of two dims only.
        clip_grad: largest global gradient norm; 0 switches clipping off.
        criterion: `taylor_first`, `taylor_second`, `taylor_mix`, `taylor_signed`, `obd`, `magnitude`, `obc`, `wanda`,
            `flap`, `minitron`.
        fisher: F = scale x mean over micro-batches of their own squared gradients (`microbatch`), exp_avg_sq before
            this iteration's optimizer step (`adam`), or the square of the mean gradient (`batch`).
        fisher_unit: scale of `microbatch`: the sequences (`sequence`) or tokens (`token`) of a micro-batch.
        damping: of layer Hessians (`obc`, second order), relative to their mean diagonal.
        second_order: update the weights that read a group before it leaves (EfficientLLM-B).
        second_order_stem: also for stem channels.
        head_score: a head's sum of S divided by its columns of W_o (`per_column`) or as it is (`sum`).
        normalize: `per_parameter` divides a group's score by the parameters that leave with it.
        layer_score: which layer is the candidate: the least by its weights' scores, or by its block influence.
        saliency_momentum: m of the moving average of unit scores; 0 switches it off.
        score_idle: score (and smooth) at scheduled iterations that have no credit to remove anything, too.
        types: kinds of groups that may go. limits: how many of a kind may go by one iteration's scores.
        balance: share of the width that a kind would have if all shrank alike; one at it waits for the others.
        min_heads, min_ffn, min_hidden, min_layers: widths that are kept.
        gqa: the unit of a head group, see `oracle_scores.head_options`.
        schedule: `ratio`, or the `cubic` or `linear` curve of sizes over tokens.
        curve: tokens at which the curve begins and ends.
        ratio: pruning steps p and gradient steps g of "p:g".
        first_prune_iter: iteration from which every g-th one is scheduled, itself included (0: g, 2 g, 3 g, ...).
        group_cost: pruning steps that a group of each kind uses up; default head_dim, 1, 1.
        target_params: pruning ends once parameters <= target; None never prunes.
        limits_besides: other limits that have to be kept too (`oracle_geometry.costs`), at `seq_length` tokens.
        distillation: (weight, temperature) of the teacher's distribution in the loss; weight 0: none.
        distilled_scores: with distillation, scores are from the `distilled` loss, or iterations that score train on
            `cross_entropy`.
        optimizer_state: after an iteration in which groups left, Adam's moments and step count are kept (`carry`) or
            begin anew (`reset`).
        finish: `exact` avoids groups that overshoot the target by more than 0.5 %; `any` does not care.
    """

    lr: Callable[[int], float] | float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    criterion: str = "taylor_mix"
    fisher: str = "microbatch"
    fisher_unit: str = "sequence"
    damping: float = 0.01
    second_order: bool = False
    second_order_stem: bool = True
    head_score: str = "sum"
    normalize: str = "per_parameter"
    layer_score: str = "weights"
    saliency_momentum: float = 0.9
    score_idle: bool = False
    types: tuple[str, ...] = oracle_scores.KINDS
    balance: float = 0.6
    limits: Mapping[str, int] = field(default_factory=lambda: {oracle_scores.HEAD: 1, oracle_scores.LAYER: 1})
    min_heads: int = 1
    min_ffn: int = 1
    min_hidden: int = 1
    min_layers: int = 1
    gqa: str = "kv_group"
    schedule: str = "ratio"
    curve: tuple[int, int] = (0, 1)
    ratio: tuple[int, int] = (1, 1)
    first_prune_iter: int = 0
    group_cost: Mapping[str, float] = field(default_factory=dict)
    target_params: int | None = None
    limits_besides: Mapping[str, float] = field(default_factory=dict)
    seq_length: int = 0
    distillation: tuple[float, float] = (0.0, 1.0)
    distilled_scores: str = "distilled"
    optimizer_state: str = "carry"
    finish: str = "exact"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")

    @property
    def floors(self) -> dict[str, int]:
        """Widths that are kept, by kind."""
        floors = (self.min_heads, self.min_ffn, self.min_hidden, self.min_layers)
        return {kind: max(1, floor) for kind, floor in zip(oracle_scores.ALL_KINDS, floors, strict=True)}

    @property
    def choice_rules(self) -> oracle_scores.ChoiceRules:
        """The part that the choice of a group depends on; only where there is a target."""
        assert self.target
        return oracle_scores.ChoiceRules(
            head_score=self.head_score,
            normalize=self.normalize,
            gqa=self.gqa,
            types=tuple(self.types),
            min_widths=self.floors,
            target=self.target,
            seq_length=self.seq_length,
            finish=self.finish,
            layer_score=self.layer_score,
        )

    @property
    def target(self) -> dict[str, float]:
        """All limits, that of the parameters first."""
        own = {} if self.target_params is None else {"params": self.target_params}
        return {**own, **self.limits_besides}
