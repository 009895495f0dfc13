"""More layouts to save on and load on than `test_layouts`: uneven pipeline stages, TP 3 with uneven slots.

With the six of `test_layouts` there are 17 pairs (A, B); on each the tensors are the same, and losses and removals go
on alike.
"""

import pytest

from megatron_prune.checkpoint.save import save_checkpoint
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import STATE, Kind, build, go_on, prune_a_little, same, tensors
from tests.checkpoint.test_layouts import Resumed, resume_all

UNEVEN_STAGES, UNEVEN_SLOTS = Kind(pp=2, distributed=True, first=3), Kind(tp=3)
# name -> (layout saved on, its ranks, {ranks: layouts loaded on})
SOURCES = {
    "uneven-stages": (
        UNEVEN_STAGES,
        4,
        {
            4: {
                "same": UNEVEN_STAGES,
                "tp4_sp": Kind(tp=4, sp=True),
                "tp2_pp2_uneven": Kind(tp=2, pp=2, first=1),
                "tp2_dp2_distributed": Kind(tp=2, distributed=True),
                "dp4": Kind(),
            },
            3: {"tp3": Kind(tp=3)},
            1: {"tp1": Kind()},
        },
    ),
    "uneven-slots": (
        UNEVEN_SLOTS,
        3,
        {
            3: {"same": UNEVEN_SLOTS},
            2: {"pp2": Kind(pp=2, first=1), "dp2_distributed": Kind(distributed=True), "tp2_sp": Kind(tp=2, sp=True)},
        },
    ),
}


def save_on(rank, world, folder, kind):
    model = build(kind)
    prune_a_little(model)
    fingerprint = model.layout.fingerprint()
    save_checkpoint(model, folder, 3, STATE)
    step = model.adam_step()
    losses = go_on(model, 3)
    return Resumed(losses, model.architecture.parameters, step, STATE["tokens"], fingerprint)


def load_on(rank, world, folder, kinds):
    return resume_all(kinds, folder)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(SOURCES))
def test_every_pair_holds_the_same_and_goes_on_alike(tmp_path, name):
    kind, ranks, targets = SOURCES[name]
    folder = tmp_path / "run"
    reference = run_ranks(save_on, ranks, str(folder), kind, timeout=200)[0]
    for world, kinds in targets.items():
        resumed = run_ranks(load_on, world, str(folder), kinds, timeout=200)[0]
        for target, found in resumed.items():
            assert same(tensors(folder), tensors(folder / f"again_{target}")), target
            assert found.losses == pytest.approx(reference.losses, rel=1e-5), target
            assert (found.parameters, found.step) == (reference.parameters, reference.step), target
            assert target != "same" or found == reference
