"""Criteria are small functions in a registry; whoever writes one gets sums, reduction and choice for nothing."""

import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.saliency.criteria import Elements, criterion, find_criterion, known_criteria
from megatron_prune.saliency.reducer import score_elements
from megatron_prune.testing.oracle import OracleSettings
from megatron_prune.testing.ranks import run_ranks
from megatron_prune.testing.sharded import Case
from megatron_prune.training.step import forward_backward
from tests.resharding.live_run import GQA, MICRO_BATCH, SEQUENCE, oracle_of, start

RULES = OracleSettings()


def score_by_a_users_criterion(_rank, _world_size):
    @criterion("root_of_taylor", needs={"gradient"})
    def root_of_taylor(elements):
        return (elements.weight * elements.gradient).abs().sqrt()

    trainer = start(Case(), GQA, RULES)
    forward_backward(trainer.model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    scores = score_elements(trainer.model, find_criterion("root_of_taylor"), fisher="batch")
    sums = scores.reduce()
    return {shard.name: values for shard, values in scores.pieces}, sums.head, sums.ffn, sums.stem


def test_a_users_criterion_in_a_few_lines():
    ((pieces, head, ffn, stem),) = run_ranks(score_by_a_users_criterion, 1)
    oracle, batches = oracle_of(GQA, RULES)
    _, gradient, _ = oracle.gradients(batches[0])
    for layer in range(2):
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = (oracle.weights[down] * gradient[down]).abs().sqrt()
        found = pieces[f"decoder.layers.{layer}.mlp.linear_fc2.weight"].view_as(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
        assert ffn[layer] == pytest.approx(expected.sum(dim=0).numpy(), rel=1e-4)
    assert head.sum() + ffn.sum() == pytest.approx(stem.sum(), rel=1e-5), "columns and rows of the same matrices"


@pytest.mark.parametrize(("typed", "meant"), [("taylor_mixed", "taylor_mix"), ("magnitud", "magnitude")])
def test_an_unknown_name_names_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"unknown criterion '{typed}'; did you mean {meant}") as caught:
        find_criterion(typed)
    assert all(name in str(caught.value) for name in known_criteria())


def test_a_name_nothing_like_any_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown criterion 'xyz' \(known: magnitude, "):
        find_criterion("xyz")


def test_a_name_is_registered_once():
    with pytest.raises(AssertionError, match="taylor_mix is registered twice"):
        criterion("taylor_mix")(lambda elements: elements.weight)


def test_the_signs_of_the_mixed_criterion():
    """Removing w changes the loss by -w g + w^2 F / 2: here the two cancel, and there they add up."""
    elements = Elements(torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]))
    assert find_criterion("taylor_mix").score(elements).tolist() == [0.0, 4.0]
    assert find_criterion("taylor_first").score(elements).tolist() == [2.0, 2.0]
    assert find_criterion("taylor_second").score(elements).tolist() == [4.0, 4.0]
    assert find_criterion("obd").score(elements).tolist() == [2.0, 2.0]
    assert find_criterion("magnitude").score(elements).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("name", known_criteria())
def test_no_criterion_is_negative_or_changes_its_input(name):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 100, generator=generator)
    fisher = gradient.square()
    kept = weight.clone(), gradient.clone(), fisher.clone()
    scores = find_criterion(name).score(Elements(weight, gradient, fisher))
    assert scores.shape == weight.shape and bool((scores >= 0).all())
    assert all(torch.equal(a, b) for a, b in zip((weight, gradient, fisher), kept, strict=True))
    empty = find_criterion(name).score(Elements(torch.zeros(3), torch.zeros(3), torch.zeros(3)))
    assert empty.tolist() == [0.0, 0.0, 0.0], "an empty slot adds nothing to a sum"
