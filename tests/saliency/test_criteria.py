"""Criteria are small functions in a registry; whoever writes one gets sums, reduction and choice for nothing."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prune.errors import UserError
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.saliency.criteria import STATISTICS, Elements, criterion, find_criterion, known_criteria
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.training.step import forward_backward
from tests.resharding.live_run import GQA, MICRO_BATCH, SEQUENCE, oracle_of, start

RULES = OracleSettings()
DOCS = Path(__file__).resolve().parents[2] / "docs" / "criteria.md"


def documented_example():
    """The one block of Python in docs/criteria.md."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    return block


def score_by_a_users_criterion(_rank, _world_size):
    """Run the documented example as a user's entry point would, up to main()."""
    exec(compile(documented_example(), "my_pretrain.py", "exec"), {"__name__": "my_pretrain"})
    trainer = start(Case(), GQA, dataclasses.replace(RULES, target_params=1000))
    trainer.pruner.settings = dataclasses.replace(trainer.pruner.settings, criterion=find_criterion("activity"))
    scoring = trainer.pruner.begin()
    forward_backward(trainer.model, trainer.batches, trainer.num_microbatches, MICRO_BATCH, SEQUENCE)
    scored = scoring.finish()
    sums = scored.unit_scores()
    pieces = {piece.row.name: piece.by_column for piece in scored._scores.pieces}
    return pieces, np.stack(sums.values[HEAD]), np.stack(sums.values[FFN]), sums.of(STEM)


def test_a_users_criterion_in_ten_lines():
    lines = documented_example().split("@criterion")[1].split("if __name__")[0].strip().splitlines()
    assert len(lines) <= 10
    ((pieces, head, ffn, stem),) = run_ranks(score_by_a_users_criterion, 1)
    oracle, batches = oracle_of(GQA, RULES)
    _, gradient, _ = oracle.gradients(batches[0])
    inputs = oracle.inputs(batches[0])
    for layer in range(2):
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        norm = inputs[down].square().mean(dim=0).sqrt()
        expected = (oracle.weights[down] * gradient[down]).abs() * norm
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
    with pytest.raises(UserError, match=r"unknown criterion 'xyz' \(known: flap, magnitude, "):
        find_criterion("xyz")


def test_a_name_is_registered_once():
    with pytest.raises(AssertionError, match="taylor_mix is registered twice"):
        criterion("taylor_mix")(lambda elements: elements.weight)


def test_the_signs_of_the_mixed_criterion():
    """Removing w changes the loss by -w g + w^2 F / 2: here the two cancel, and there they add up."""
    elements = Elements(torch.tensor([2.0, 2.0]), torch.tensor([1.0, -1.0]), {"fisher": torch.tensor([1.0, 1.0])})
    assert find_criterion("taylor_mix").score(elements).tolist() == [0.0, 4.0]
    assert find_criterion("taylor_first").score(elements).tolist() == [2.0, 2.0]
    assert find_criterion("taylor_second").score(elements).tolist() == [4.0, 4.0]
    assert find_criterion("obd").score(elements).tolist() == [2.0, 2.0]
    assert find_criterion("magnitude").score(elements).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("name", known_criteria())
def test_only_signed_scores_are_negative_and_no_criterion_changes_its_input(name):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, 100, generator=generator)
    statistics = {kind: torch.rand(100, generator=generator) for kind in sorted(STATISTICS)}
    statistics["live"] = torch.ones(100)
    kept = weight.clone(), gradient.clone(), {kind: values.clone() for kind, values in statistics.items()}
    found = find_criterion(name)
    for score in filter(None, (found.score, found.stem)):
        scores = score(Elements(weight, gradient, statistics))
        assert scores.shape == weight.shape and bool((scores >= 0).all()) == (name != "taylor_signed")
        assert torch.equal(weight, kept[0]) and torch.equal(gradient, kept[1])
        assert all(torch.equal(statistics[kind], kept[2][kind]) for kind in statistics)
        in_empty_slots = {**statistics, "live": torch.zeros(100)}
        scores = score(Elements(torch.zeros(100), torch.zeros(100), in_empty_slots))
        assert not scores.any(), "an empty slot adds nothing to a sum"


def test_what_a_criterion_did_not_declare_it_does_not_get():
    elements = Elements(torch.ones(2), torch.ones(2), {"fisher": torch.ones(2)})
    with pytest.raises(AssertionError, match='reads input_norm declares it: needs={"input_norm"'):
        find_criterion("wanda").score(elements)
    with pytest.raises(AssertionError, match=r"criterion odd needs \['curvature'\]; there are fisher, gradient, "):
        criterion("odd", needs={"curvature"})


def test_criteria_of_the_inputs():
    """By hand: one column's statistics and two weights."""
    elements = Elements(
        torch.tensor([2.0, -3.0]),
        torch.zeros(2),
        {
            "input_norm": torch.full((2,), 5.0),
            "input_variance": torch.full((2,), 7.0),
            "input_magnitude": torch.full((2,), 4.0),
            "stem_magnitude": torch.tensor([0.5, 1.5]),
            "inverse_hessian": torch.full((2,), 0.25),
            "live": torch.tensor([1.0, 1.0]),
        },
    )
    assert find_criterion("wanda").score(elements).tolist() == [10.0, 15.0]
    assert find_criterion("flap").score(elements).tolist() == [28.0, 63.0]
    assert find_criterion("obc").score(elements).tolist() == [16.0, 36.0]
    assert find_criterion("minitron").score(elements).tolist() == [4.0, 4.0]
    stem = find_criterion("minitron").stem
    assert stem is not None and stem(elements).tolist() == [0.5, 1.5]
