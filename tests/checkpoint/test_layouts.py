"""Saved on one layout in mid-pruning, loaded on others: the same tensors, the same losses and removals from there."""

from dataclasses import dataclass

import pytest
import torch

from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import save_checkpoint, save_weights
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import KV_HEAD
from megatron_prune.model.llama import take
from megatron_prune.model.sources import RandomWeights
from megatron_prune.model.table import positions
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import (
    OLMO2,
    SHAPE,
    STATE,
    UNTIED,
    Kind,
    build,
    go_on,
    mesh_of,
    prune_a_little,
    remove,
    same,
    tensors,
)

A = Kind(tp=2, distributed=True)  # x DP 2 on four ranks
ON_FOUR = {
    "same": A,
    "tp2_pp2": Kind(tp=2, pp=2),
    "tp4_sp": Kind(tp=4, sp=True),
    "dp4_distributed": Kind(distributed=True),
    "dp4": Kind(),
}
ON_ONE = {"tp1": Kind()}


@dataclass(frozen=True)
class Resumed:
    """What a run said after loading."""

    losses: list[float]
    parameters: int
    step: int
    tokens: int
    fingerprint: str


def resume_all(kinds, folder):
    """Load on each layout in turn, save again at once, go on."""
    found = {}
    for name, kind in kinds.items():
        record = RunRecord.read(folder)
        model = build(kind, record=record)
        state = load_checkpoint(model, folder)
        fingerprint = model.layout.fingerprint()
        save_checkpoint(model, f"{folder}/again_{name}", 3, state)
        step = model.adam_step()
        losses = go_on(model, 3)
        found[name] = Resumed(losses, model.architecture.parameters, step, state["tokens"], fingerprint)
    return found


def save_then_resume(rank, world, folder, first=A, shape=SHAPE, kinds=ON_FOUR):
    model = build(first, shape)
    prune_a_little(model)
    fingerprint = model.layout.fingerprint()
    empty = [model.layout.empty_slots(kind) for kind in model.layout.placed if kind.is_prunable]
    save_checkpoint(model, folder, 3, STATE)
    step = model.adam_step()
    losses = go_on(model, 3)
    reference = Resumed(losses, model.architecture.parameters, step, STATE["tokens"], fingerprint)
    return reference, empty, resume_all(kinds, folder)


def resume_on_one(rank, world, folder):
    return resume_all(ON_ONE, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, the uninterrupted run, its empty slots, the resumed runs by layout)."""
    folder = tmp_path_factory.mktemp("layouts")
    reference, empty, resumed = run_ranks(save_then_resume, 4, str(folder))[0]
    return folder, reference, empty, resumed | run_ranks(resume_on_one, 1, str(folder))[0]


@pytest.mark.parametrize("name", [*ON_FOUR, *ON_ONE])
def test_every_layout_holds_the_same_tensors(runs, name):
    folder, _, empty, _ = runs
    assert min(empty) > 0
    assert same(tensors(folder), tensors(folder / f"again_{name}"))


@pytest.mark.parametrize("name", [*ON_FOUR, *ON_ONE])
def test_every_layout_goes_on_alike(runs, name):
    _, reference, _, resumed = runs
    assert resumed[name].losses == pytest.approx(reference.losses, rel=1e-5)
    assert resumed[name].parameters == reference.parameters
    assert resumed[name].step == reference.step == 3
    assert resumed[name].tokens == STATE["tokens"]


def test_the_same_layout_goes_on_bit_for_bit(runs):
    _, reference, _, resumed = runs
    assert resumed["same"] == reference  # losses, and slots with their empty ones, included
    assert resumed["tp2_pp2"].fingerprint == reference.fingerprint


def test_norms_over_the_heads_of_all_ranks(tmp_path):
    """OLMo 2: the ranks share out the norms of queries and keys, and empty slots of theirs do not count."""
    kinds = {"same": Kind(tp=2, sp=True, distributed=True), "pp2": Kind(pp=2), "dp2": Kind(distributed=True)}
    reference, empty, resumed = run_ranks(save_then_resume, 2, str(tmp_path), kinds["same"], OLMO2, kinds)[0]
    assert min(empty) > 0 and resumed["same"] == reference
    for name in kinds:
        assert resumed[name].losses == pytest.approx(reference.losses, rel=1e-5)
        assert same(tensors(tmp_path), tensors(tmp_path / f"again_{name}"))
    norm = tensors(tmp_path)["model/model.layers.0.self_attn.k_norm.weight"]
    assert len(norm) == OLMO2.kv_channels * len(CheckpointReader(tmp_path).architecture.ids(KV_HEAD, 0))


def test_live_units_only(runs):
    folder = runs[0]
    reader = CheckpointReader(folder)
    shapes = table_of(SHAPE).hf_shapes(reader.architecture)
    assert {name: tuple(reader.read(name).shape) for name in reader.names} == shapes
    assert sum(reader.read(name).numel() for name in reader.names) == reader.architecture.parameters


def live_part(shape, architecture):
    """The live part of the random source model, computed without any layout."""
    source, found = RandomWeights(shape, seed=3, std=0.2), {}
    for row in table_of(shape).rows:
        for part in row.parts:
            ids = [positions(architecture.ids(dim.kind, row.site), dim.size) for dim in part.dims]
            found[part.hf_name] = take(source(part.hf_name), ids)
    return found


def save_untrained_and_bf16(rank, world, folder):
    """Untied with QK norms: removals without training; then bf16 with main weights and fp32 on it, and the reverse."""
    model = build(Kind(tp=2, bf16=True, distributed=True), UNTIED)
    prune_a_little(model)
    save_checkpoint(model, f"{folder}/bf16", 3, STATE)
    fp32 = build(Kind(pp=2), UNTIED, RunRecord.read(f"{folder}/bf16"))
    load_checkpoint(fp32, f"{folder}/bf16")
    save_checkpoint(fp32, f"{folder}/fp32", 3, STATE)
    again = build(Kind(bf16=True), UNTIED, RunRecord.read(f"{folder}/fp32"))
    load_checkpoint(again, f"{folder}/fp32")
    save_checkpoint(again, f"{folder}/bf16_again", 3, STATE)
    without = build(Kind(bf16=True), UNTIED, RunRecord.read(f"{folder}/bf16"))
    load_checkpoint(without, f"{folder}/bf16", load_optim=False)
    save_checkpoint(without, f"{folder}/no_optimizer", 3, STATE)
    fresh = build(Kind(pp=2), UNTIED)
    for kind in ("head", "ffn", "stem", "stem"):
        remove(fresh, kind, 1)
    save_checkpoint(fresh, f"{folder}/fresh", 0, {})
    architecture = fresh.layout.architecture
    save_weights(mesh_of(Kind()), f"{folder}/weights", 0, architecture, LivePart(architecture), torch.float32, {})


class LivePart:
    """A source of canonical tensors, as a conversion tool has one."""

    def __init__(self, architecture):
        self.tensors = live_part(architecture.shape, architecture)

    def __call__(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def precisions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precisions")
    run_ranks(save_untrained_and_bf16, 2, str(folder))
    return folder


def test_what_is_stored_is_the_live_part_of_the_source(precisions):
    reader = CheckpointReader(precisions / "fresh")
    expected = live_part(UNTIED, reader.architecture)
    assert reader.architecture.hidden_size == UNTIED.hidden_size - 2
    assert same({name: reader.read(name) for name in reader.names}, expected)
    assert reader.record.facts.optimizer == ()


def test_a_checkpoint_of_weights_alone_is_like_one_of_a_new_run(precisions):
    assert same(tensors(precisions / "weights"), tensors(precisions / "fresh"))


def test_precision_survives_going_from_bf16_to_fp32_and_back(precisions):
    bf16, fp32 = tensors(precisions / "bf16"), tensors(precisions / "fp32")
    names = CheckpointReader(precisions / "bf16").names
    assert all(bf16[f"model/{name}"].dtype == torch.bfloat16 for name in names)
    assert any(not torch.equal(bf16[f"main/{name}"], bf16[f"model/{name}"].float()) for name in names)
    for name in names:
        assert torch.equal(fp32[f"model/{name}"], bf16[f"main/{name}"])
        assert torch.equal(fp32[f"exp_avg_sq/{name}"], bf16[f"exp_avg_sq/{name}"])
    assert "main" not in CheckpointReader(precisions / "fp32").record.facts.optimizer
    assert same(tensors(precisions / "bf16_again"), bf16)


def test_the_optimizer_may_be_left_out(precisions):
    reader = CheckpointReader(precisions / "no_optimizer")
    assert reader.record.facts.optimizer == ("main",)
    assert reader.record.facts.adam_step == 0
    bf16 = tensors(precisions / "bf16")
    expected = {key: value for key, value in bf16.items() if not key.startswith("exp_avg")}
    assert same(tensors(precisions / "no_optimizer"), expected)
