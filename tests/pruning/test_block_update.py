"""The block update on one dense layer, in fp64: it is constrained least squares, and single columns do not add up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.pruning.second_order import block_update
from megatron_prune.saliency.hessian import Hessian

OUT, FEATURES, TOKENS = 7, 12, 40


def layer(seed, rank=FEATURES):
    """W [out, in] and X [tokens, in] with collinear features where `rank` is small, one never active."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, rank, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(rank, FEATURES, generator=generator, dtype=torch.float64)
    x[:, 5] = 0
    return torch.randn(OUT, FEATURES, generator=generator, dtype=torch.float64), x


def hessian_of(x, damping=0.01):
    return Hessian.of_gram(x.T @ x / len(x), damping)


def split(update, size):
    return update.split([update.shape[1] - 2 * size, size, size], dim=1)


@given(
    st.integers(0, 99), st.sets(st.integers(0, FEATURES - 1), min_size=1, max_size=5), st.sampled_from([3, FEATURES])
)
def test_it_is_constrained_least_squares(seed, gone, rank):
    """Solved as a least-squares problem: rows of X and of sqrt(ridge) I, only the surviving columns as unknowns."""
    w, x = layer(seed, rank)
    hessian = hessian_of(x)
    columns = torch.tensor(sorted(gone))
    kept = torch.tensor([i for i in range(FEATURES) if i not in gone])
    m, removed, compensated = split(block_update(hessian, columns), len(columns))
    found = w - w[:, columns] @ m
    assert torch.equal(found[:, columns], torch.zeros(OUT, len(columns), dtype=torch.float64))
    system = torch.cat([x / TOKENS**0.5, hessian.ridge**0.5 * torch.eye(FEATURES, dtype=torch.float64)])
    best = torch.linalg.lstsq(system[:, kept], system @ w.T).solution.T
    torch.testing.assert_close(found[:, kept], best, rtol=1e-10, atol=1e-10)

    def error(new):
        return ((w - new) @ x.T).square().sum() / TOKENS

    def predicted(matrix):
        return ((w[:, columns] @ matrix) * w[:, columns]).sum()

    cut = w.clone()
    cut[:, columns] = 0
    torch.testing.assert_close(predicted(removed), error(cut), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(predicted(compensated), error(found), rtol=1e-7, atol=1e-9)


def test_summing_updates_of_single_columns_is_wrong():
    """The columns of a head do not vanish, and cutting them off afterwards is worse than the block update."""
    w, x = layer(0)
    hessian, columns = hessian_of(x), torch.tensor([0, 1, 2, 3])
    m, _, _ = split(block_update(hessian, columns), 4)
    block = w - w[:, columns] @ m
    summed = w.clone()
    for column in columns:
        single, _, _ = split(block_update(hessian, column[None]), 1)
        summed -= w[:, column[None]] @ single
    assert float(summed[:, columns].abs().max()) > 0.1
    summed[:, columns] = 0
    errors = [float(((w - new) @ x.T).square().sum()) for new in (block, summed)]
    assert errors[1] > 1.5 * errors[0]


def test_features_that_never_fire_neither_give_nor_take():
    _, x = layer(1)
    m, removed, compensated = split(block_update(hessian_of(x), torch.tensor([5])), 1)
    assert m[0, 5] == 1 and m.abs().sum() == 1 and removed.abs().max() < 1e-15 and compensated.abs().max() < 1e-15
    m, _, _ = split(block_update(hessian_of(x), torch.tensor([2, 3])), 2)
    assert m[:, 5].tolist() == [0, 0]


def test_the_single_column_form_is_the_surgeons():
    """w_p / [H^-1]_pp times the column of H^-1: Optimal Brain Surgeon's update, and obc's score is its error."""
    _, x = layer(2)
    hessian = hessian_of(x)
    inverse = torch.linalg.inv(hessian.damped)
    m, _, compensated = split(block_update(hessian, torch.tensor([4])), 1)
    torch.testing.assert_close(m[0], inverse[:, 4] / inverse[4, 4])
    ridge = hessian.ridge * m.square().sum()
    torch.testing.assert_close(compensated[0, 0] + ridge, 1 / hessian.inverse_diagonal()[4])


def test_inputs_that_are_not_finite_give_nan_throughout():
    _, x = layer(3)
    x[0, 0] = torch.inf
    m, _, _ = split(block_update(hessian_of(x), torch.tensor([1])), 1)
    assert bool(m[:, [0, 2]].isnan().all())


@pytest.mark.parametrize("tokens", [3, 1])
def test_fewer_tokens_than_features_are_enough(tokens):
    w, x = layer(4)
    m, _, _ = split(block_update(hessian_of(x[:tokens]), torch.tensor([0, 7])), 2)
    error = ((w[:, [0, 7]] @ m) @ x[:tokens].T).square().sum() / ((w[:, [0, 7]] @ x[:tokens, [0, 7]].T).square().sum())
    assert float(error) < 0.01
