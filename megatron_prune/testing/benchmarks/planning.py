"""What single ranks of a run on 512 plan and send, for models that need so many: a table of the benchmarks.

    Planned         a shape and how it lies on the ranks
    SHAPES          1.7 B, 7 B and 70 B parameters
    worn            a layout in which a compaction is due
    compaction_of   one rank's compaction: what it sends, and what really changes its owner
    measure_plans   rows of one shape

No weight exists (`testing.helpers.many_ranks`): processor times are of the host, for operators that have nothing to do.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_prune.checkpoint.tensors import facts_of, sources
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.groups import Rules, default_names, find_group
from megatron_prune.pruning.selector import choose
from megatron_prune.resharding.live import LiveModel
from megatron_prune.saliency.scores import UnitScores, score_length, smooth
from megatron_prune.testing.benchmarks.costs import FP32_BYTES, CostRow
from megatron_prune.testing.helpers.many_ranks import Sent, elements_handed_on, one_of, wide_model

WORLD = 512
STATE_BYTES, WEIGHT_BYTES = 12, 2  # of an element: main weight and moments in fp32; bf16
MOMENTUM = 0.9
SCORES, CHOICE = "removal: smoothing, scores of what is left", "removal: choice, on rank 0"
SIZES, RETIREMENT = "removal: sizes after it, whether a compaction is due", "removal: retirement in the rank's stage"
COMPACTION, CHECKPOINT = "compaction, copying nothing", "checkpoint: who writes what"
Spent = defaultdict[str, list[float]]  # processor seconds


@dataclass(frozen=True)
class Planned:
    """A model on many ranks."""

    shape: LlamaShape
    tp: int
    pp: int
    quanta: Quanta = field(default_factory=dict)

    @property
    def layout(self) -> ShardLayout:
        """Of the source."""
        return ShardLayout.pack(Architecture.full(self.shape), self.tp, self.quanta)


SHAPES = {
    "1.7B": Planned(LlamaShape(24, 2048, 8192, 32, 32, 64, 49152, 2048, tie_word_embeddings=True), 1, 1),
    "7B": Planned(LlamaShape(32, 4096, 11008, 32, 32, 128, 32000, 4096), 2, 1),
    "70B": Planned(LlamaShape(80, 8192, 28672, 64, 8, 128, 32000, 4096), 8, 8),
}


def rules_for(shape: LlamaShape) -> Rules:
    """By which heads leave every rank alike: one query head of each KV head, or a KV head with its only one."""
    return Rules(1, gqa="uniform" if shape.heads_per_group > 1 else "kv_group")


def random_group(architecture: Architecture, name: str, random: np.random.Generator) -> Group:
    """A group of the kind called `name`; which of its units leave a layer is left to chance."""
    scores = UnitScores.from_vector(architecture, random.random(score_length(architecture)))
    return find_group(name).offer(scores, architecture, rules_for(architecture.shape)).group


def worn(planned: Planned, name: str) -> ShardLayout:
    """The source's layout after so many groups of a kind left, by chance, that a compaction is due."""
    layout, random = planned.layout, np.random.default_rng(0)
    while not layout.is_due:
        layout = layout.without(random_group(layout.architecture, name, random))
    return layout


@dataclass(frozen=True)
class CompactionCost:
    """By global rank of the receiver: bytes and messages that one rank sends; bytes of what it has that changes its
    owner, and of how many parameters (weights counted apart)."""

    bytes: Mapping[int, int]
    messages: Mapping[int, int]
    changing: Mapping[int, int]
    pairs: Mapping[int, int]
    seconds: float


def compaction_of(model: LiveModel, sent: Sent) -> CompactionCost:
    """Compact `model`, and count."""
    rows, layout, spans = list(model.rows()), model.layout, model.owned_spans()
    since = time.process_time()
    model.compact()
    seconds = time.process_time() - since
    states, weights = elements_handed_on(rows, model.mesh, (layout, model.layout), (spans, model.owned_spans()))
    changing, pairs = Counter[int](), Counter[int]()
    for counted, size in ((states, STATE_BYTES), (weights, WEIGHT_BYTES)):
        for (_, rank), elements in counted.items():
            changing[rank] += size * elements
            pairs[rank] += 1
    return CompactionCost(dict(sent.bytes), dict(sent.messages), dict(changing), dict(pairs), seconds)


def measure_plans(_rank: int, _world_size: int, planned: Planned, ranks: tuple[int, ...], times: int) -> list[CostRow]:
    """Rows of one shape.

    Args:
        ranks: those that are looked at. times: removals of each kind that are planned.
    """
    spent, most = Spent(list), 0
    _plan_removals(planned, spent, times)
    for rank in ranks:
        with one_of(WORLD, rank, planned.tp, planned.pp) as (mesh, _):
            model, random = wide_model(mesh, planned.layout), np.random.default_rng(rank)
            for name in default_names() * times:
                group, since = random_group(model.architecture, name, random), time.process_time()
                model.retire(group)
                spent[RETIREMENT].append(time.process_time() - since)
            since = time.process_time()
            most = max(most, len(sources(model, facts_of(model))))
            spent[CHECKPOINT].append(time.process_time() - since)
    compactions = [row for name in default_names() for row in _rows_of_compaction(planned, name, ranks, spent)]
    milliseconds = {what: 1000 * statistics.median(seconds) for what, seconds in spent.items()}
    removal = (SCORES, CHOICE, RETIREMENT, SIZES)
    return [
        CostRow("context: TP x PP x DP", f"{planned.tp} x {planned.pp} x {WORLD // planned.tp // planned.pp}"),
        *(CostRow(f"{what} / ms", f"{milliseconds[what]:.1f}") for what in removal),
        CostRow("removal: all of it / ms", f"{sum(milliseconds[what] for what in removal):.1f}", goal="10"),
        *(CostRow(f"{what} / ms", f"{milliseconds[what]:.0f}") for what in (COMPACTION, CHECKPOINT)),
        CostRow("checkpoint: rectangles of the rank with most", f"{most:,}"),
        CostRow("bytes: scores of a batch", f"{FP32_BYTES * score_length(planned.layout.architecture):,}"),
        *compactions,
    ]


def _plan_removals(planned: Planned, spent: Spent, times: int) -> None:
    """What a removal plans of the whole model, by new scores each time."""
    layout, random, smoothed = planned.layout, np.random.default_rng(0), None
    rules = rules_for(planned.shape)
    for name in default_names() * times:
        architecture = layout.architecture
        sums = UnitScores.from_vector(architecture, random.random(score_length(architecture), dtype=np.float32))
        at = [time.process_time()]
        smoothed = smooth(smoothed, sums, MOMENTUM)
        at.append(time.process_time())
        choose(smoothed, architecture, rules)
        at.append(time.process_time())
        group = find_group(name).offer(smoothed, architecture, rules).group
        layout = layout.without(group)
        at.append(time.process_time())
        _ = layout.is_due, layout.architecture.parameters
        at.append(time.process_time())
        smoothed = smoothed.restricted(layout.architecture)
        at.append(time.process_time())
        spent[SCORES].append(at[1] - at[0] + at[5] - at[4])
        spent[CHOICE].append(at[2] - at[1])
        spent[SIZES].append(at[4] - at[3])


def _rows_of_compaction(planned: Planned, name: str, ranks: tuple[int, ...], spent: Spent) -> Iterator[CostRow]:
    """Of that one of `ranks` that sends most in the compaction which groups of a kind bring."""
    layout, costs = worn(planned, name), list[CompactionCost]()
    for rank in ranks:
        with one_of(WORLD, rank, planned.tp, planned.pp) as (mesh, sent):
            costs.append(compaction_of(wide_model(mesh, layout), sent))
            spent[COMPACTION].append(costs[-1].seconds)
    most = max(costs, key=lambda cost: sum(cost.bytes.values()))
    sent_bytes, changing = sum(most.bytes.values()), sum(most.changing.values())
    yield CostRow(f"bytes: compaction, {name}", f"{sent_bytes:,}")
    yield CostRow(f"its bytes / what changes its owner, {name}", f"{sent_bytes / max(changing, 1):.2f}", goal="1.10")
    yield CostRow(f"messages: compaction, {name}", f"{sum(most.messages.values()):,}")
