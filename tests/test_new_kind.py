"""What a new kind of group costs: one kind, one row of the table, one group, all in this file.

Pairs of neighbouring FFN channels leave together. Nothing of the package knows of them; they are pruned on two
tensor-parallel ranks, compacted on the way, and compared with the dense oracle, whose candidates are paired here too.
Everything is registered in the ranks' own processes, so that other tests do not see it.
"""

import dataclasses

import pytest

from megatron_prune.config import GroupConfig, GroupConfigs
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.launch.assembly.assemble import fresh_model
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.families import llama_rows, register_rows
from megatron_prune.model.kinds import FFN, TP, Kind, register_kind
from megatron_prune.model.table import Dim, Param, Part
from megatron_prune.pruning.groups import GroupKind, group_names, register_group
from megatron_prune.resharding.coordinator import verify
from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import init_mesh
from megatron_prune.testing.helpers import comparison
from megatron_prune.testing.helpers.oracle_cases import MODELS
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, RandomTokens, run_config
from megatron_prune.testing.helpers.tiny_models import random_llama_weights
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle_geometry import FFN as ORACLE_FFN
from megatron_prune.testing.reference.oracle_geometry import count
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.state import RunState
from megatron_prune.training.trainer import Datasets, Trainer

PAIR = Kind("ffn_pair", "pairs", "pairs of FFN channels", lambda shape: shape.ffn_hidden_size // 2, TP)


def paired_rows(shape):
    """A Llama's rows, whose FFN channels are counted in pairs: units of two elements."""

    def paired(dim):
        return Dim(PAIR, 2) if dim.kind == FFN else dim

    for row in llama_rows(shape):
        parts = tuple(Part(part.hf_name, tuple(map(paired, part.dims))) for part in row.parts)
        yield Param(row.name, row.layer, row.role, parts)


def register():
    register_kind(PAIR)
    register_rows("paired", paired_rows)
    register_group(GroupKind("ffn_pair", PAIR))


class Losses(Reporter):
    """Keeps every report."""

    def __init__(self, config):
        super().__init__(config, 1, None, is_active=False)
        self.reports = []

    def iteration(self, report, architecture):
        self.reports.append(report)


def train(_rank, _world_size, case, hf_config, weights, settings, iterations):
    register()
    mesh = init_mesh(choose_device("cpu"), case.tp, case.pp)
    config = run_config(settings, comparison.MICRO_BATCHES, comparison.MICRO_BATCH, comparison.SEQUENCE)
    groups = GroupConfigs(head=GroupConfig(cost=3), ffn_pair=GroupConfig(floor=3))
    pruning = dataclasses.replace(config.pruning, types=("head", "ffn_pair", "stem"), groups=groups)
    config = dataclasses.replace(config, pruning=pruning)
    shape = dataclasses.replace(shape_from_config(hf_config), model_type="paired")
    config = case.applied(config)
    model = fresh_model(config, Architecture.full(shape), mesh, weights.__getitem__)
    samples = iterations * comparison.MICRO_BATCHES * comparison.MICRO_BATCH
    tokens = RandomTokens(hf_config["vocab_size"], comparison.SEQUENCE, samples)
    recorder = Losses(config)
    trainer = Trainer(config, model, Datasets(tokens, None), RunState(), recorder)
    for _ in range(iterations):
        trainer.iterate()
    verify(model, thorough=True)
    losses, history = [report.loss for report in recorder.reports], trainer.state.history
    removals = [(removal.kind, next(iter(removal.group.gone.values())), removal.parameters) for removal in history]
    return losses, removals, trainer.coordinator.compactions, model.layout.stored.ffn


def paired_candidates(scores, geometry, live, rules):
    """The oracle's candidates, of FFN channels in pairs."""
    others = tuple(kind for kind in rules.types if kind != ORACLE_FFN)
    found = list(ONE_BY_ONE(scores, geometry, live, dataclasses.replace(rules, types=others)))
    options = []
    for layer in scores.ffn:
        pairs = sorted({unit // 2 for unit in layer})
        options.append(sorted((layer[2 * i] + layer[2 * i + 1], (2 * i, 2 * i + 1)) for i in pairs))
    units = tuple(layer[0][1] for layer in options)
    if len(options[0]) - 1 < 3:  # the floor, in pairs
        return found
    before, after = count(geometry, live), count(geometry, live.without(ORACLE_FFN, units))
    least, scale = sum(layer[0][0] for layer in options), before - after
    swap = min(layer[1][0] - layer[0][0] for layer in options)
    left = len(live.of(ORACLE_FFN, 0)) - 2
    found.append(
        oracle_scores.OracleCandidate(ORACLE_FFN, units, least / scale, (least + swap) / scale, after, left, after)
    )
    return found


ONE_BY_ONE = oracle_scores.candidates


@pytest.mark.parametrize("case", [Case(tp=2), Case(pp=2, dp=2, distributed_optimizer=True)], ids=lambda case: case.name)
def test_a_kind_of_its_own_is_pruned_as_the_oracle_does(case, monkeypatch):
    monkeypatch.setattr(oracle_scores, "candidates", paired_candidates)
    config = MODELS["gqa-tied"]
    weights = random_llama_weights(config, seed=3)
    settings = comparison.oracle_settings(config, 0.5, gqa="cluster")
    oracle, expected = comparison.oracle_run(config, weights, settings, 30)
    job = (train, case.world_size, case, config, weights, settings, 30)
    losses, removals, compactions, stored = run_ranks(*job)[0]
    theirs = []
    for removal in oracle.removals:
        name, units = removal.kind, removal.units
        if removal.kind == ORACLE_FFN:
            name, units = "ffn_pair", tuple((pair[0] // 2,) for pair in units)
        theirs.append((name, units, removal.parameters_after))
    assert removals == theirs
    assert {"stem", "ffn_pair"} <= {name for name, _, _ in theirs}
    assert losses == pytest.approx([step.loss for step in expected], rel=1e-5)
    pairs = sum(name == "ffn_pair" for name, _, _ in theirs)
    assert compactions > 0 and 0 <= stored * case.tp - (64 - 2 * pairs) < 2 * case.tp
    assert "ffn_pair" not in group_names(), "registered in the ranks' processes only"
