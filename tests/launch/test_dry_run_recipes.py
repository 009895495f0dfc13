"""Every shipped recipe: it dry-runs without any download, fits its hardware, reaches its target, is documented."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_prune.config import Config, read_file
from megatron_prune.launch.estimate.dry_run import NOT_HERE, estimate, look
from megatron_prune.pretrain import main

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "configs"
RECIPES = sorted(FOLDER.glob("*.yaml"))
DEBUG, PLANNED_FOR, GPU_BYTES = "debug_cpu.yaml", 64, 80e9
SELF_EXPLAINING = {"save_interval", "save_retain_interval", "keep_last", "async_save", "lr_decay_style", "log_interval"}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Paths in recipes count from the repository's root."""
    monkeypatch.chdir(FOLDER.parents[1])


def processes(path):
    return 1 if path.name == DEBUG else PLANNED_FOR


def test_the_papers_runs_are_there():
    names = {path.stem for path in RECIPES}
    assert {
        "smollm_360m_to_134m",
        "smollm_360m_to_134m_curve",
        "smollm_1.7b_to_469m",
        "smollm_1.7b_to_1.1b",
        "llama_7b_to_50",
        "llama_7b_to_70",
        "llama2_7b_to_1.3b",
        "llama2_7b_to_2.7b",
        "llama2_7b_to_1.3b_b",
        "llama2_7b_to_2.7b_b",
        "smollm_1.7b_to_469m_obd",
        "smollm_1.7b_to_469m_obc",
        "smollm_1.7b_to_469m_sparsegpt",
        "smollm_1.7b_to_469m_llm_pruner",
        "debug_cpu",
    } <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_dry_runs(path, capfd):
    status = main(["--config", str(path), "--dry-run", "--world-size", str(processes(path))])
    captured = capfd.readouterr()
    assert status == 0, captured.err
    assert NOT_HERE in captured.out and "note:" not in captured.out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_dry_runs_on_512_processes_or_says_what_to_change(path, capfd):
    call = ["--config", str(path), "--dry-run", "--world-size", "512"]
    ways = [[]]
    if main(call):
        told = capfd.readouterr().err
        assert told.startswith("error: training.global_batch_size") and told.count("\n") == 1
        ways = [["--global-batch-size", re.search(r"; use (\d+)", told)[1]]]
        if other := re.search(r"or micro_batch_size (\d+)$", told.strip()):
            ways.append(["--micro-batch-size", other[1]])
        else:
            ways.append(["--world-size", re.search(r"or start (\d+) processes$", told.strip())[1]])
    for flags in ways:
        assert main([*call, *flags]) == 0, flags
        report = capfd.readouterr().out
        assert "hours: not estimated" in report or re.search(r"hours more for [\d,]+ scorings, [\d,]+ removals", report)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_fits_and_reaches_its_target(path):
    config = read_file(path)
    found = estimate(config, look(config).architecture, processes(path))
    assert found.memory.peak < 0.8 * GPU_BYTES, "leave room for the allocator and the collectives"
    assert found.phases[0].iterations < config.training.train_iters
    assert config.pruning.target_params * 0.98 <= found.route.target.parameters <= config.pruning.target_params


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_documented(path):
    """A comment stands above the fields (or the run of fields) that it explains; no comment names a host."""
    text = path.read_text()
    assert re.search(r"https?:|www\.", text) is None
    assert text.startswith("# ") and all(len(line) <= 120 for line in text.splitlines())
    explained, bare = False, []
    for line in text.splitlines():
        if re.match(r"  # ", line):
            explained = True
        elif match := re.match(r"  (\w+):", line):
            bare += [] if explained or match[1] in SELF_EXPLAINING else [match[1]]
        else:
            explained = False
    assert bare == [] or path.name == DEBUG
    if path.name != DEBUG:
        assert text.count("[paper]") >= 5 and text.count("[choice]") >= 5


@pytest.mark.parametrize(
    ("name", "variant", "fields"),
    [
        ("smollm_1.7b_to_469m", "obd", {"metric"}),
        ("smollm_1.7b_to_469m", "llm_pruner", {"metric"}),
        ("smollm_1.7b_to_469m", "obc", {"metric", "second_order"}),
        ("smollm_1.7b_to_469m", "sparsegpt", {"metric", "second_order"}),
        ("llama2_7b_to_1.3b", "b", {"second_order"}),
        ("llama2_7b_to_2.7b", "b", {"second_order"}),
    ],
)
def test_variants_differ_from_the_base_in_what_they_are_about_alone(name, variant, fields):
    base, other = read_file(FOLDER / f"{name}.yaml"), read_file(FOLDER / f"{name}_{variant}.yaml")
    assert all(getattr(base.pruning, field) != getattr(other.pruning, field) for field in fields)
    assert base.checkpoint.save != other.checkpoint.save
    same = dataclasses.replace(
        other,
        pruning=dataclasses.replace(other.pruning, **{field: getattr(base.pruning, field) for field in fields}),
        checkpoint=dataclasses.replace(other.checkpoint, save=base.checkpoint.save),
    )
    assert same == base


def test_recipes_keep_their_runs_apart():
    folders = [read_file(path).checkpoint.save for path in RECIPES]
    assert len(set(folders)) == len(RECIPES) and all(folder != Config().checkpoint.save for folder in folders)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("SmolLM-135M", 134_515_008),
        ("SmolLM-360M", 361_821_120),
        ("SmolLM-1.7B", 1_711_376_384),
        ("Llama-7B", 6_738_415_616),
        ("Llama-2-7B", 6_738_415_616),
        ("stories260K", 260_032),
    ],
)
def test_shapes_have_the_published_size(name, parameters):
    from megatron_prune.huggingface.cluster import read_architecture

    assert read_architecture(FOLDER / "shapes" / name).parameters == parameters
