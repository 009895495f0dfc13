"""When groups go: the published token counts come out, a pause follows each head, and pruning ends at the target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.schedule import CurveSchedule, RatioSchedule

BATCH = 1_048_576
SMOL_1_7B = LlamaShape(24, 2048, 8192, 32, 32, 64, 49152, 2048, tie_word_embeddings=True)
FINAL = {HEAD: 19, FFN: 3018, STEM: 1225}  # widths of the published 469M model, read from its figure
GROUPS = {HEAD: 32 - 19, FFN: 8192 - 3018, STEM: 2048 - 1225}
COST = {HEAD: 64, FFN: 1, STEM: 2}


def schedule(p, g, start=0, target=0, cost=None):
    return RatioSchedule(p, g, start, cost or COST, target)


def run(schedule, order):
    """[(iteration, kind)] of groups in `order`; what counts as parameters are the groups left over."""
    credits, removed, iteration = 0.0, [], 0
    while len(removed) < len(order):
        iteration += 1
        left = len(order) - len(removed)
        if not schedule.is_open(iteration, 0, left):
            continue
        credits = schedule.credited(credits)
        while schedule.is_due(credits, 0, len(order) - len(removed)):
            kind = order[len(removed)]
            credits = schedule.spent(credits, kind)
            removed.append((iteration, kind))
    return removed


def test_the_published_widths_are_the_published_size():
    live = {kind: (np.arange(width, dtype=np.int32),) for kind, width in FINAL.items()}
    sites = {kind: sites * kind.sites(SMOL_1_7B) for kind, sites in live.items()}
    final = Architecture(SMOL_1_7B, {**Architecture.full(SMOL_1_7B).live, **sites})
    assert final.parameters == pytest.approx(469e6, rel=0.01)


@pytest.mark.parametrize(("ratio", "billions"), [((4, 1), 2.5), ((2, 1), 4.5), ((1, 1), 8.4), ((1, 9), 72.1)])
def test_published_token_counts(ratio, billions):
    """EfficientLLM's ablation of the ratio: SmolLM-1.7B to 469M with batches of 1,048,576 tokens, from step 500 on.

    The final widths, the 500 steps and the stem's cost of 2 were read from a plot, hence a tolerance of 2.5 %.
    """
    order = [HEAD] * GROUPS[HEAD] + ([FFN] * 6 + [STEM]) * GROUPS[STEM] + [FFN] * (GROUPS[FFN] - 6 * GROUPS[STEM])
    assert {kind: order.count(kind) for kind in GROUPS} == GROUPS
    last, _ = run(schedule(*ratio, start=500), order)[-1]
    assert last * BATCH / 1e9 == pytest.approx(billions, rel=0.025)


def test_a_head_is_followed_by_a_pause_as_long_as_its_cost():
    removed = run(schedule(1, 9, start=9), [FFN, HEAD, FFN, STEM, FFN, FFN])
    assert [iteration // 9 for iteration, _ in removed] == [1, 2, 66, 67, 69, 70]


def test_several_groups_go_in_one_iteration():
    assert [i for i, _ in run(schedule(4, 1), [FFN] * 9)] == [1] * 4 + [2] * 4 + [3]
    assert [i for i, _ in run(schedule(4, 1), [STEM] * 4)] == [1, 1, 2, 2]


def test_only_every_gth_iteration_from_the_first_on_counts():
    plan = schedule(1, 3, start=5)
    assert [i for i in range(1, 15) if plan.is_open(i, 0, parameters=10)] == [5, 8, 11, 14]
    plan = schedule(1, 3)
    assert [i for i in range(1, 10) if plan.is_open(i, 0, parameters=10)] == [3, 6, 9], "counted from iteration 0"


def test_pruning_ends_at_the_target():
    plan = schedule(1, 1, target=100)
    assert plan.is_open(1, 0, 101) and plan.is_due(1.0, 0, 101)
    assert not plan.is_open(1, 0, 100) and not plan.is_due(5.0, 0, 100)
    assert not plan.is_due(0.5, 0, 101), "no credit left"


def test_a_curve_s_sizes_are_zhu_and_gupta_s():
    cubic, linear = (CurveSchedule(shape, 1000, 3000, 900, 100) for shape in ("cubic", "linear"))
    assert [float(cubic.size(tokens)) for tokens in (0, 1000, 2000, 3000, 9999)] == [900, 900, 200, 100, 100]
    assert [float(linear.size(tokens)) for tokens in (0, 1000, 2000, 2500, 3000)] == [900, 900, 500, 300, 100]


@given(
    shape=st.sampled_from(["cubic", "linear"]),
    start=st.integers(0, 500),
    length=st.integers(1, 3000),
    batch=st.integers(1, 400),
    costs=st.lists(st.integers(1, 90), min_size=1, max_size=40),
)
def test_a_curve_is_kept_to_and_foretold(shape, start, length, batch, costs):
    """Walk as the trainer does: never more than one group below the curve, never above it, at the target in time."""
    source = 50 + sum(costs)
    plan = CurveSchedule(shape, start, start + length, source, target_params=50)
    sizes = source - np.cumsum([0, *costs])
    happened, removed, iteration = [], 0, 0
    while sizes[removed] > 50:
        iteration += 1
        tokens = iteration * batch
        assert iteration <= -(-plan.end // batch), "the target is reached once `end` tokens are consumed"
        if not plan.is_open(iteration, tokens, sizes[removed]):
            continue
        while plan.is_due(plan.credited(0.0), tokens, sizes[removed]):
            assert sizes[removed] > plan.size(tokens)
            happened.append(iteration)
            removed += 1
        assert sizes[removed] <= plan.size(tokens)
    kinds = ["ffn"] * len(costs)
    assert abs(plan.forecast(kinds, sizes[:-1], batch) - happened).max() <= 1, "a root may round across a border"
    assert np.mean(plan.forecast(kinds, sizes[:-1], batch) == happened) > 0.5
