"""One Llama in megatron-core's GPTModel and HybridModel: the same numbers, the same checkpoints; one line where a
release has no HybridModel."""

import importlib.util

import pytest
import torch

from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import save_checkpoint
from megatron_prune.errors import UserError
from megatron_prune.model.classes import engine_of
from megatron_prune.model.llama import inner_model
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import SEQ, SHAPE, STATE, UNTIED, Kind, build, go_on, prune_a_little, same, tensors

HAS_HYBRID = importlib.util.find_spec("megatron.core.models.hybrid") is not None
hybrid = pytest.mark.skipif(not HAS_HYBRID, reason="this megatron-core has no HybridModel")


def kinds(**layout):
    return [Kind(engine=engine, **layout) for engine in ("gpt", "hybrid")]


def run(rank, world, kind, shape):
    """Class, modules in `decoder.layers`, logits before and after removals and steps, losses, names of parameters."""
    model = build(kind, shape)
    llama = inner_model(model.module)
    tokens = torch.randint(0, shape.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(2))

    def logits():
        with torch.no_grad():
            return model.module(tokens, torch.arange(SEQ).unsqueeze(0), None) if world == kind.tp else None

    first, losses = logits(), prune_a_little(model)
    model.compact()
    names = [name for name, _, _ in model.rows()]
    bases = [base.__name__ for base in type(llama).__mro__]
    return bases, len(llama.decoder.layers), first, logits(), [*losses, *go_on(model, 3)], names


@hybrid
@pytest.mark.parametrize("shape", [SHAPE, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2, "sp": True}, {"pp": 2, "first": 1}, {"distributed": True}], ids=lambda one: str(one)
)
def test_both_classes_compute_the_same_to_the_last_bit(shape, layout):
    ranks = 1 if not layout else 2
    one, other = (run_ranks(run, ranks, kind, shape) for kind in kinds(**layout))
    for ours, theirs in zip(one, other):
        assert "GPTModel" in ours[0] and "HybridModel" in theirs[0] and theirs[1] == 2 * ours[1]
        for before, after in zip(ours[2:4], theirs[2:4]):
            assert before is None or torch.equal(before, after)
        assert ours[4:] == theirs[4:]


def save(rank, world, kind, folder):
    model = build(kind)
    prune_a_little(model)
    save_checkpoint(model, folder, 3, STATE)
    losses = go_on(model, 3)
    save_checkpoint(model, folder + "-end", 6, STATE)
    return losses


def resume(rank, world, kind, folder):
    model = build(kind, record=RunRecord.read(folder))
    load_checkpoint(model, folder)
    losses = go_on(model, 3)
    save_checkpoint(model, folder + "-other", 6, STATE)
    return losses


@hybrid
@pytest.mark.parametrize("turned", [False, True], ids=["gpt-hybrid", "hybrid-gpt"])
def test_a_run_of_one_class_goes_on_in_the_other_bit_for_bit(tmp_path, turned):
    first, second = kinds(tp=2)[:: -1 if turned else 1]
    folder = str(tmp_path / "run")
    assert run_ranks(save, 2, first, folder) == run_ranks(resume, 2, second, folder)
    assert same(tensors(folder + "-end"), tensors(folder + "-other"))


@pytest.mark.skipif(HAS_HYBRID, reason="this megatron-core has a HybridModel")
def test_a_release_without_hybrid_models_says_so_in_one_line():
    with pytest.raises(UserError, match=r"^model\.engine: megatron-core \S+ has no HybridModel .*; use gpt or auto$"):
        engine_of("hybrid")
    assert engine_of("auto") == engine_of("gpt") == "gpt"
