"""A recorded sequence of removals is repeated: on other layouts, other data, at other speeds; what does not fit is
refused."""

import dataclasses
import json

import pytest

from megatron_prune.commands import main as command
from megatron_prune.config import read_file
from megatron_prune.config.recipe import write_recipe
from megatron_prune.pretrain import main
from megatron_prune.testing.benchmarks.kills import Traces, victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import prepare

TARGET = 11_400


def run(words, ranks=1, exit_code=0):
    fates = watch_ranks(victim, ranks, main, [str(word) for word in words])
    assert [fate.exit_code for fate in fates] == [exit_code] * ranks, fates[0].output
    return fates[0].output


def lines(folder):
    return [json.loads(line) for line in (folder / "pruning_history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """A run along a curve over half of 20 iterations."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    run(arguments(tiny, folder))
    return folder


def arguments(tiny, save, *more):
    whole = ("--prune-ratio", "null", "--prune-curve", "end=50%", "--train-iters", 20, "--continue-tokens", 0)
    return tiny.arguments(save, *whole, "--continue-lr-warmup-iters", 0, "--lr-decay-style", "linear", *more)


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)])
def test_the_same_groups_leave_at_the_same_tokens_whatever_the_scores_are(tiny, recorded, tmp_path, layout):
    other = ("--seed", 9, "--prune-replay", recorded / "pruning_history.jsonl", *layout)
    run(arguments(tiny, tmp_path / "run", *other), 2 if layout else 1)
    mine, theirs = lines(tmp_path / "run"), lines(recorded)
    assert [(line["gone"], line["parameters"], line["tokens"]) for line in mine] == [
        (line["gone"], line["parameters"], line["tokens"]) for line in theirs
    ]


def test_a_longer_run_stretches_it_and_is_resumed_in_the_middle(tiny, recorded, tmp_path):
    history = recorded / "pruning_history.jsonl"
    words = ("--train-iters", 40, "--prune-replay", history, "--prune-replay-end", "50%")
    run(arguments(tiny, tmp_path / "whole", *words))
    mine, theirs = lines(tmp_path / "whole"), lines(recorded)
    assert [line["gone"] for line in mine] == [line["gone"] for line in theirs]
    assert mine[-1]["iteration"] == 20, "where the curve ends"
    scale = mine[-1]["tokens"] / theirs[-1]["tokens"]
    assert all(0 <= m["tokens"] - scale * t["tokens"] < 64 for m, t in zip(mine, theirs, strict=True))
    for stop in (5, 12):
        run(arguments(tiny, tmp_path / "parts", *words, "--exit-interval", stop))
    run(arguments(tiny, tmp_path / "parts", *words))
    assert Traces.read(tmp_path / "parts") == Traces.read(tmp_path / "whole")


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny, recorded, tmp_path):
    history = recorded / "pruning_history.jsonl"
    wider = tiny_config(intermediate_size=52)
    other = write_hf_folder(tmp_path / "other", wider, random_llama_weights(wider))
    damaged, gone = tmp_path / "damaged.jsonl", tmp_path / "gone.jsonl"
    damaged.write_text(history.read_text().replace('"parameters"', '"parametres"', 3))
    gone.write_text("".join(line + "\n" for line in 2 * history.read_text().splitlines()[:1] for _ in range(2)))
    cases = (
        (("--prune-replay", history, "--hf-model", other), "replay on a source of the same shape"),
        (("--prune-replay", history, "--prune-target-params", 9000), "above pruning.target_params 9000"),
        (("--prune-replay", damaged), "damaged.jsonl:1: not a line of a pruning history"),
        (("--prune-replay", gone), "gone.jsonl:2: its group is not in this source"),
        (("--prune-replay", tmp_path / "nowhere"), "cannot be read"),
        (("--prune-replay", history, "--prune-ratio", "1:1"), "pruning.replay needs pruning.target_params"),
        (("--prune-replay-end", "20%"), "pruning.replay_end belongs to pruning.replay"),
    )
    for words, complaint in cases:
        for more in ((), ("--dry-run",)):
            assert complaint in run(arguments(tiny, tmp_path / "run", *words, *more), exit_code=2), words
            assert not (tmp_path / "run").exists()


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    assert command(["recipe", str(recorded), "--output", str(path)]) == 0
    return path


def places(tiny, save):
    """What a recipe does not say: source, data, where to save."""
    own = ("--hf-model", tiny.source, "--tokenizer-model", tiny.folder / "tokenizer.model", "--data-path", tiny.data(0))
    own += ("--make-vocab-size-divisible-by", 8, "--split", "80,20,0", "--device", "cpu", "--save", save)
    return [*own, "--log-interval", 1, "--progress", "lines", "--no-report"]


def test_a_recipe_repeats_the_run_on_ones_own_data(tiny, recorded, recipe, tmp_path):
    run(["--recipe", recipe, *places(tiny, tmp_path / "again")])
    mine, theirs = lines(tmp_path / "again"), lines(recorded)
    assert [(line["gone"], line["parameters"], line["tokens"]) for line in mine] == [
        (line["gone"], line["parameters"], line["tokens"]) for line in theirs
    ]
    first, second = (read_file(folder / "config.yaml") for folder in (recorded, tmp_path / "again"))
    assert second.optimizer == dataclasses.replace(first.optimizer, lr_schedule="whole_run")
    assert (second.training, second.continued) == (first.training, first.continued)
    run(["--recipe", recipe, *places(tiny, tmp_path / "slower"), "--train-iters", 30])
    assert read_file(tmp_path / "slower" / "config.yaml").training.train_iters == 30, "flags win"


def test_a_recipe_holds_no_places_and_reads_well(tiny, recorded, recipe):
    text = recipe.read_text()
    assert str(tiny.folder) not in text and str(recorded) not in text
    held = json.loads(text)
    assert held["history"] == lines(recorded)
    assert held["result"]["parameters"] == lines(recorded)[-1]["parameters"]
    assert held["source"]["name"] == "source" and held["shape"]["num_layers"] == 2
    assert [one["name"] for one in held["data"]["sets"]] == ["data_0", "data_1"]
    assert len(text.splitlines()) == len(held["history"]) + 11, "a removal a line"


def test_recipes_that_do_not_fit_are_one_line(tiny, recorded, recipe, tmp_path):
    held = json.loads(recipe.read_text())
    wider = tiny_config(vocab_size=64, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=52)
    other = write_hf_folder(tmp_path / "other", wider, random_llama_weights(wider))

    def spoilt(name, **changes):
        path = tmp_path / f"{name}.json"
        whole = {key: value for key, value in (held | changes).items() if key not in ("format", "digest")}
        path.write_text(write_recipe(whole))
        return path

    edited = tmp_path / "edited.json"
    edited.write_text(recipe.read_text().replace('"parameters": ', '"parameters": 1', 1))
    cases = (
        (edited, (), "contradicts its digest"),
        (recorded / "summary.json", (), "no recipe"),
        (tmp_path / "nowhere.json", (), "cannot read the recipe"),
        (recipe, ("--hf-model", other), "is for a source with ffn_hidden_size 48, this one has 52"),
        (spoilt("places", settings={"checkpoint": {"save": "x"}}), (), "checkpoint.save is not a recipe's to say"),
        (spoilt("sly", settings={"training": {"seed": "1\nlogging: {wandb_project: x}"}}), (), "settings"),
        (spoilt("unknown", settings={"training": {"sede": "1"}}), (), "sede"),
    )
    for path, words, complaint in cases:
        told = run(["--recipe", path, *places(tiny, tmp_path / "run"), *words], exit_code=2)
        assert complaint in told and "Traceback" not in told, told
        assert not (tmp_path / "run").exists()


def test_the_dry_run_says_so(tiny, recorded, tmp_path):
    output = run(arguments(tiny, tmp_path / "run", "--prune-replay", recorded / "pruning_history.jsonl", "--dry-run"))
    assert "as recorded in" in output and f"pruning: {len(lines(recorded))} groups" in output
