"""megatron-prune score and megatron-prune prune-once: the oracle's scores and choices on a user's files; mistakes."""

import contextlib
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.config import load_config, validate
from megatron_prune.launch.assembly.assemble import build_datasets
from megatron_prune.launch.assembly.one_shot_run import one_shot_config
from megatron_prune.launch.assembly.opening import open_inputs
from megatron_prune.model.kinds import FFN, STEM
from megatron_prune.pruning.history import read_history
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle import DenseOracle, OracleSettings
from tests.launch.conftest import VOCABULARY
from tests.model.random_models import the_one

CONFIG = tiny_config(vocab_size=VOCABULARY)
WEIGHTS = random_llama_weights(CONFIG)
BATCHES, MICRO_BATCH = 4, 2
SCORES = {"criterion": "obd", "fisher_unit": "token"}
ONCE = {"saliency_momentum": 0.0, "ratio": (999, 1), "group_cost": {"head": 1, "ffn": 1, "stem": 1}, "limits": {}}


def call(tool, arguments):
    """(exit status, stdout, stderr) of a tool in this process."""
    from megatron_prune import pretrain
    from megatron_prune.commands import convert_to_hf, prune_once, score_model

    main = {"score": score_model, "prune": prune_once, "export": convert_to_hf, "pretrain": pretrain}[tool].main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in arguments])
    return status, out.getvalue(), err.getvalue()


def call_all(_rank, world_size, calls):
    """One call on several ranks, or several ones after another on one rank without a launcher."""
    import torch.distributed as dist

    if world_size == 1:
        dist.destroy_process_group()
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[variable]
    return [call(*one) for one in calls]


def tools(world_size, *calls):
    """Results of the first rank."""
    return run_ranks(call_all, world_size, calls, timeout=110)[0]


def flags(workshop, *more, source=("--hf-model", None)):
    return [
        source[0], source[1] or workshop / "source", "--data-path", workshop / "data",
        "--tokenizer-model", workshop / "tokenizer.model", "--seq-length", 32, "--micro-batch-size", MICRO_BATCH,
        "--split", "90,10,0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def batches(workshop):
    """The calibration batch as the oracle takes it."""
    config = one_shot_config(load_config([str(word) for word in flags(workshop)]), BATCHES)
    samples = build_datasets(config, open_inputs(config)).train
    rows = [samples[i] for i in range(BATCHES * MICRO_BATCH)]
    assert all(bool((row["loss_mask"] == 1).all()) for row in rows)
    tokens, labels = (torch.stack([row[name] for row in rows]).split(MICRO_BATCH) for name in ("tokens", "labels"))
    return list(zip(tokens, labels, strict=True))


def test_a_training_runs_configuration_serves_as_it_is(workshop):
    """Whatever says when to prune, and what becomes of Adam, means nothing here and refuses nothing."""
    curve = ("--prune-schedule", "curve", "--prune-curve", "start=1B", "end=5B", "--lr-schedule", "whole_run")
    words = flags(workshop, "--prune-target-params", "10K", *curve, "--prune-optimizer-state", "reset")
    validate(one_shot_config(load_config([str(word) for word in (*words, "--prune-fisher", "adam")]), BATCHES), 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_scores_are_the_oracles(workshop, batches, tmp_path, tp):
    names = ["taylor_mix", "taylor_first", "obd", "magnitude"]
    layout = ["--tensor-model-parallel-size", tp, *(["--sequence-parallel"] * (tp > 1))]
    outputs = ["--json", tmp_path / "scores.json", "--plot", tmp_path / "scores.png"]
    arguments = flags(workshop, *layout, "--batches", BATCHES, "--criterion", *names, *outputs)
    ((status, out, err),) = tools(tp, ("score", arguments))
    assert status == 0, err
    found = json.loads((tmp_path / "scores.json").read_text())["criteria"]
    assert list(found) == names
    oracle = DenseOracle(CONFIG, WEIGHTS, OracleSettings(**SCORES))
    _, gradient, squares = oracle.gradients(batches)
    for name in names:
        elements = {
            key: oracle_scores.element_scores(name, oracle.weights[key], gradient[key], squares[key]) for key in squares
        }
        expected = oracle_scores.unit_scores(elements, oracle.geometry, oracle.live)
        for kind in ("head", "ffn"):
            layers = [list(layer.values()) for layer in getattr(expected, kind)]
            np.testing.assert_allclose(found[name][kind], layers, rtol=1e-5, err_msg=f"{name} {kind}")
        np.testing.assert_allclose(found[name]["stem"], list(expected.stem.values()), rtol=1e-5, err_msg=name)
        assert f"{name}: sums of S per unit" in out and "first to go: " in out
    assert (tmp_path / "scores.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def pruned(workshop, tmp_path_factory):
    """A model pruned to 60 % on two ranks after one scoring, and what may be done with it."""
    folder = tmp_path_factory.mktemp("pruned")
    target = DenseOracle(CONFIG, WEIGHTS, OracleSettings(**SCORES)).parameters() * 6 // 10
    prune = flags(workshop, "--prune-target-params", target, "--batches", BATCHES, "--save", folder / "once")
    ((status, out, err),) = tools(2, ("prune", [*prune, "--tensor-model-parallel-size", 2]))
    assert status == 0, err
    further = flags(
        workshop, "--prune-target-params", target, "--continue-tokens", 1024, "--continue-lr", "1e-3",
        "--save", folder / "trained", source=("--load", folder / "once"),
    )  # fmt: skip
    smaller = flags(
        workshop, "--prune-target-params", target * 9 // 10, "--batches", BATCHES, "--rescore-every", 3,
        "--save", folder / "smaller", source=("--load", folder / "once"),
    )  # fmt: skip
    export = ("export", ["--load", folder / "once", "--save", folder / "hf", "--verify"])
    later = tools(1, export, ("pretrain", further), ("prune", smaller))
    return SimpleNamespace(folder=folder, target=target, out=out, later=later)


def test_one_scoring_removes_what_the_oracle_removes(pruned, batches):
    oracle = DenseOracle(CONFIG, WEIGHTS, OracleSettings(target_params=pruned.target, **SCORES, **ONCE))
    oracle.train_step(batches)  # scores before it steps
    history = read_history(pruned.folder / "once" / "pruning_history.jsonl")
    for mine, theirs in zip(history, oracle.removals, strict=True):
        assert the_one(mine.group) == (theirs.kind, theirs.units)
    assert {(removal.iteration, removal.tokens) for removal in history} == {(0, 0)}
    architecture = CheckpointReader(pruned.folder / "once").architecture
    assert architecture.parameters == history[-1].parameters <= pruned.target
    stages = json.loads((pruned.folder / "once" / "summary.json").read_text())["stages"]
    assert stages["source"]["validation_loss"] != stages["pruned"]["validation_loss"]
    assert f"removed {len(history)} groups" in pruned.out


def test_the_pruned_weights_are_the_sources(pruned):
    reader = CheckpointReader(pruned.folder / "once")
    stem, channels = (ids.tolist() for ids in (reader.architecture.ids(STEM, 0), reader.architecture.ids(FFN, 2)))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(reader.read(name), WEIGHTS[name][channels][:, stem])
    layout = reader.record.saved_layout
    assert reader.record.facts.optimizer == () and layout.fingerprint() == layout.compacted().fingerprint()


def test_it_is_exported_and_trained_on(pruned):
    (status, out, err), (trained, _, complaint), _ = pruned.later
    assert status == 0 and "verify" in out, err
    assert trained == 0, complaint
    once, later = CheckpointReader(pruned.folder / "once"), CheckpointReader(pruned.folder / "trained")
    assert later.architecture == once.architecture and later.meta["iteration"] == 4
    assert later.meta["history"] == once.meta["history"]


def test_a_checkpoint_is_pruned_further_with_new_scores(pruned):
    _, _, (status, out, err) = pruned.later
    assert status == 0, err
    first, second = (read_history(pruned.folder / name / "pruning_history.jsonl") for name in ("once", "smaller"))
    assert second[: len(first)] == first and second[-1].parameters <= pruned.target * 9 // 10
    count = len(second) - len(first)
    assert f"scored {-(-count // 3)} times: removed {count} groups" in out


def test_mistakes_are_one_line_and_nothing_is_written(workshop, tmp_path):
    for name, value in (("nan", torch.nan), ("huge", 3e38)):  # the second is read, and overflows in the forward pass
        broken = dict(WEIGHTS, **{"model.norm.weight": torch.full((32,), value)})
        write_hf_folder(tmp_path / name, CONFIG, broken)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    save, target = ("--save", tmp_path / "out"), ("--prune-target-params", 20000)
    nan, huge = ("--hf-model", tmp_path / "nan"), ("--hf-model", tmp_path / "huge")
    cases = {
        ("score", "--criterion", "taylor_frist"): "--criterion: unknown criterion 'taylor_frist'; did you mean",
        ("score", "--criterion", "xyz"): "known: flap, magnitude, ",
        ("score", "--batches", 0): "--batches must be between 1",
        ("score", "--plot", tmp_path / "nowhere" / "x.png"): "--plot",
        ("score", "--plot", tmp_path / "x.doc"): "ends in .png, .svg or .pdf",
        ("score", "--batchs", 3): "unknown flag --batchs",
        ("score", "--data-path", tmp_path / "none"): "none",
        ("score", *nan): "32 of 32 values are NaN or infinite",
        ("score", *huge): "not finite",
        ("prune", *save): "pruning.target_params (--prune-target-params) is not set",
        ("prune", *target): "checkpoint.save (--save) is not set",
        ("prune", *target, "--save", tmp_path / "full"): "is there already",
        ("prune", *save, "--prune-target-params", "1M"): "is not below the source's",
        ("prune", *save, *target, "--prune-min-ffn", 49): "pruning.groups: ffn: floor 49 is above the model's 48",
        (
            "prune",
            *save,
            *target,
            "--prune-groups",
            "stem.floor=33",
        ): "pruning.groups: stem: floor 33 is above the model's 32",
        ("prune", *save, *target, "--prune-types", "head"): "cannot be reached",
        ("prune", *save, *target, "--prune-metric", "taylor_mixed"): "unknown criterion 'taylor_mixed'; did you mean",
        ("prune", *save, *target, *nan): "32 of 32 values are NaN or infinite",
        ("prune", *save, *target, *huge): "20000 is not reached",
    }
    results = tools(1, *((tool, flags(workshop, *more)) for tool, *more in cases))
    for (given, words), (status, out, err) in zip(cases.items(), results, strict=True):
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and words in lines[0], (given, status, out, err)
        assert "Traceback" not in err, given
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]


def prune_unseen(_rank, world_size, arguments):
    """The tool, where a pass over data is a mistake."""
    from megatron_prune.training import one_shot

    def forward_backward(*_more):
        raise AssertionError("magnitudes ask for no data")

    one_shot.forward_backward = forward_backward
    return call_all(_rank, world_size, [("prune", arguments)])


def test_magnitudes_are_pruned_without_a_pass_over_data(workshop, tmp_path):
    words = flags(workshop, "--prune-metric", "magnitude", "--prune-target-params", 20_000, "--save", tmp_path / "run")
    ((status, output, errors),) = run_ranks(prune_unseen, 1, words, timeout=110)[0]
    assert status == 0 and "saved: " in output, errors
    assert CheckpointReader(tmp_path / "run").record.architecture.parameters <= 20_000
