"""The configuration as the pruning phase takes it: rules of the choice, schedule, what is collected for scores.

`PruningSettings` is what a pruner needs besides model and state; whoever has no `Config` makes one by hand.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

from megatron_prune.config import Config
from megatron_prune.config.options import filled
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import LAYER
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.balance import balanced_widths
from megatron_prune.pruning.budget import FLOPS, KV_CACHE, LATENCY, Limit, Measure, flops_per_token, kv_cache_per_token
from megatron_prune.pruning.groups import BLOCK_INFLUENCE, Rules, find_group, known_groups
from megatron_prune.pruning.latency import LatencyTable
from megatron_prune.pruning.replay import Replay, ReplaySchedule
from megatron_prune.pruning.schedule import CurveSchedule, RatioSchedule, Schedule
from megatron_prune.pruning.spike_guard import SpikeGuard
from megatron_prune.saliency.collector import CollectorSettings
from megatron_prune.saliency.criteria import Criterion, find_criterion

_NO_STATISTICS = "magnitude"  # a criterion that needs none, where nothing is decided by scores


@dataclass(frozen=True)
class PruningSettings:
    """How units are scored and removed.

    Args:
        rules: of the choice. criterion: what is summed per unit.
        collector: what the statistics depend on.
        momentum: of the scores' smoothing over scoring steps; 0: none.
        updates: whether weights beside a group take over what they can (second order); `updates_stem`: also for units
            of kinds that all layers share.
        refresh: removals after which inverse Hessians are computed anew.
        round_to: by name of kind, multiples to which live widths are brought at the target.
        limits: by name of kind of group, how many may leave by one batch's scores; absent: any number.
        guard: when pruning pauses, or None.
        replay: removals that are repeated, whatever the scores are, or None.
        resets_adam: whether Adam begins anew after an iteration in which groups left.
    """

    rules: Rules
    criterion: Criterion
    collector: CollectorSettings
    momentum: float = 0.0
    updates: bool = False
    updates_stem: bool = False
    refresh: int = 1
    round_to: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    guard: SpikeGuard | None = None
    replay: Replay | None = None
    resets_adam: bool = False

    @property
    def looks_at_data(self) -> bool:
        """Whether scores or updates come from a batch at all; magnitudes do not."""
        return bool(self.criterion.needs) or self.updates or self.collector.block_influence


def selector_rules(config: Config, source: Architecture) -> Rules:
    """The selector's part of the configuration, for a run that starts from `source`; without any target it is one
    parameter."""
    pruning = config.pruning
    floors = {name: group.floor for name, group in pruning.groups.items()}
    floors[LAYER.name] = max(floors.get(LAYER.name, 1), config.parallel.pipeline_model_parallel_size)  # none is empty
    rules = filled(
        Rules,
        pruning,
        target_params=pruning.target_params if pruning.enabled else 1,
        floors=floors,
        draw_seed=config.training.seed if pruning.metric == "random" else None,
        limits=tuple(_limit(name, most, config) for name, most in pruning.target.other_limits.items()),
        scores={name: group.score for name, group in pruning.groups.items()},
    )
    return dataclasses.replace(rules, widths=balanced_widths(source, rules, pruning.balance))


def group_costs(config: Config, shape: LlamaShape) -> dict[str, int]:
    """Pruning steps that a group of each kind uses up, by name."""
    given = {name: group.cost for name, group in config.pruning.groups.items()}
    return {kind.name: given.get(kind.name) or kind.default_cost(shape) for kind in known_groups()}


def group_limits(config: Config) -> dict[str, int]:
    """Groups of a kind that may leave by one batch's scores, by name, where that is limited."""
    given = {name: group.limit for name, group in config.pruning.groups.items()}
    limits = {kind.name: given.get(kind.name) or kind.default_limit for kind in known_groups()}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _limit(name: str, most: float, config: Config) -> Limit:
    measures: dict[str, Measure] = {
        FLOPS: partial(flops_per_token, seq_length=config.data.seq_length),
        KV_CACHE: kv_cache_per_token,
    }
    if config.pruning.target.latency_table is not None:
        measures[LATENCY] = _latency_table(config.pruning.target.latency_table).measure
    return Limit(name, most, measures[name])


@lru_cache(maxsize=1)
def _latency_table(path: str) -> LatencyTable:
    return LatencyTable.read(path)


def pruning_schedule(config: Config, source: Architecture) -> Schedule:
    """The schedule's part of the configuration, for a run that starts from `source`."""
    pruning = config.pruning
    replay, budget = recorded(config, source), selector_rules(config, source).budget
    if replay is not None:
        assert pruning.target_params is not None
        return ReplaySchedule(replay, config.replay_tokens, source.parameters, pruning.target_params)
    if pruning.follows_curve:
        start, end = config.curve_tokens
        return CurveSchedule(pruning.curve.shape, start, end, budget.size(source), budget.target)
    steps, gradients = pruning.ratio_steps
    costs = group_costs(config, source.shape)
    return RatioSchedule(steps, gradients, pruning.first_prune_iter, costs, budget.target)


def recorded(config: Config, source: Architecture) -> Replay | None:
    """What this run repeats from `source` on, or None. Raises UserError if it does not fit."""
    pruning = config.pruning
    if pruning.replay is None or pruning.target_params is None:
        return None
    return Replay.read(pruning.replay, source, pruning.target_params)


def live_multiples(config: Config, source: Architecture) -> dict[str, int]:
    """By name of a kind of group, what its live width is brought to a multiple of at the target: `round_to`, and for
    kinds in `pruning.types` that say nothing the kind's own."""
    pruning = config.pruning
    kinds = {name: find_group(name).kind for name in pruning.types}
    own = {name: kind.round_to(kind.size(source.shape)) for name, kind in kinds.items()}
    return own | {name: group.round_to for name, group in pruning.groups.items() if group.round_to is not None}


def collector_settings(config: Config, dp_size: int) -> CollectorSettings:
    """The part of the configuration that statistics depend on."""
    pruning, training = config.pruning, config.training
    micro_batch_tokens = training.micro_batch_size * config.data.seq_length
    num_microbatches = training.global_batch_size // (training.micro_batch_size * dp_size)
    kept = math.ceil(pruning.second_order.calibration_tokens / (micro_batch_tokens * dp_size))
    return CollectorSettings(
        fisher=pruning.fisher,
        fisher_scale=micro_batch_tokens if pruning.fisher_unit == "token" else training.micro_batch_size,
        num_microbatches=num_microbatches,
        kept_microbatches=min(kept, num_microbatches),
        damping=pruning.second_order.damping,
        block_influence=not pruning.replay
        and any(pruning.groups.of(name).score == BLOCK_INFLUENCE for name in pruning.types),
    )


def pruning_settings(config: Config, dp_size: int, source: Architecture) -> PruningSettings:
    """All of it, for a run from `source` on `dp_size` data-parallel ranks."""
    pruning, second_order = config.pruning, config.pruning.second_order
    rules, guard = selector_rules(config, source), config.pruning.spike_guard
    is_shared = any(find_group(name).kind.is_shared for name in pruning.types)
    return PruningSettings(
        rules=rules,
        criterion=find_criterion(_NO_STATISTICS if pruning.replay else pruning.metric),
        collector=collector_settings(config, dp_size),
        momentum=pruning.saliency_momentum,
        updates=second_order.enabled,
        updates_stem=second_order.enabled and second_order.stem and is_shared,
        refresh=second_order.refresh,
        round_to=live_multiples(config, source),
        limits=group_limits(config),
        guard=None if guard.factor is None else SpikeGuard(guard.factor, guard.window),
        replay=recorded(config, source),
        resets_adam=pruning.optimizer_state == "reset",
    )
