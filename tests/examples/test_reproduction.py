"""The reproduction's runner: what a plan comes to, one tiny run end to end, resuming, what verdicts say."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_prune.config import load_config
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape
from megatron_prune.model.architecture import Architecture
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "reproduction"


run = load_script(FOLDER / "run.py")


@pytest.fixture
def content() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "plan.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("plan", "human"), [("plan.yaml", "human"), ("smollm2.yaml", "human_smollm2")])
def test_every_claim_compares_methods_that_there_are(plan: str, human: str) -> None:
    content = yaml.safe_load((FOLDER / plan).read_text(encoding="utf-8"))
    named = {method for compared in content["claims"].values() for method in compared}
    assert named <= set(content["methods"])
    assert all(len(compared) > 1 for compared in content["claims"].values())
    assert f"examples/reproduction/{human} " in content["methods"]["scratch_human"]["train"]
    target = load_config(shlex.split(content["target"])).pruning.target_params
    assert 0.99 * target < Architecture.full(read_shape(FOLDER / human)).parameters <= target


def test_a_subset_is_its_methods_by_lengths_seeds_and_rates(content: dict[str, Any]) -> None:
    quick, everything = run.plan(content, "quick"), run.plan(content, "all")
    late = {name for name, method in content["methods"].items() if "from_steps" in method}
    assert len(everything) == (len(content["methods"]) * 4 - len(late)) * 3 * 3
    assert {planned.method for planned in quick} < {planned.method for planned in everything}
    assert {planned.steps for planned in quick} == {60}
    assert len({planned.name for planned in everything}) == len(everything)
    names = [planned.name for planned in everything]
    for planned in everything:  # what is needed has been made by then
        assert planned.needs is None or names.index(planned.needs) < names.index(planned.name)
    with pytest.raises(UserError, match="--subset some: unknown; there are quick, medium, long, all"):
        run.plan(content, "some")


def test_names_with_spaces_stay_one_word(content: dict[str, Any], tmp_path: Path) -> None:
    places = run.Places("/with space/and 'quotes'", tmp_path / "runs", tmp_path, content)
    (planned,) = [one for one in run.plan(content, "quick") if one.name == "llm_pruner_60_1_0.006"]
    cut, train = run.commands(planned, places)
    assert cut[0] == "prune-once" and cut[cut.index("--hf-model") + 1] == "/with space/and 'quotes'/stories260K"
    assert train[train.index("--load") + 1] == cut[cut.index("--save") + 1]
    assert train[train.index("--lr-warmup-iters") + 1] == "3" and "--hf-model" not in train


def test_the_sources_cost_is_counted_in_steps(content: dict[str, Any], tmp_path: Path) -> None:
    """The run that is to be beaten has the FLOPs of source and pruning together; the source is there before."""
    places = run.Places("/data", tmp_path / "runs", tmp_path, content)
    planned = {one.name: one for one in run.plan(content, "long")}
    (whole,) = run.commands(planned["scratch_counted_600_1_0.006"], places)
    assert whole[whole.index("--train-iters") + 1] == "1860" and whole[whole.index("--lr-warmup-iters") + 1] == "93"
    assert planned["scratch_counted_600_1_0.006"].steps == 600
    own = planned["own_source_600_1_0.006"]
    (train,) = run.commands(own, places)
    assert own.needs == "source_scratch_600_1_0.006" and train[train.index("--train-iters") + 1] == "600"
    assert train[train.index("--load") + 1] == str(tmp_path / "runs" / own.needs) and "--finetune" in train
    (tmp_path / "runs" / own.needs / "iter_0000600").mkdir(parents=True)
    (tmp_path / "runs" / own.needs / "iter_0000600" / "architecture.json").write_text("{}")
    run.release(tmp_path / "runs" / own.needs, tmp_path / "none", is_source=True)
    assert (tmp_path / "runs" / own.needs / "iter_0000600").is_dir()
    run.release(tmp_path / "runs" / own.needs, tmp_path / "none", is_source=False)
    assert not (tmp_path / "runs" / own.needs / "iter_0000600").exists()


def test_verdicts_ask_for_two_standard_errors() -> None:
    def result(method: str, steps: int, seed: int, loss: float, rate: float = 1.0) -> dict[str, Any]:
        return {"method": method, "steps": steps, "seed": seed, "learning_rate": rate, "loss": loss, "tokens": steps}

    results = [
        *(result("a", 60, seed, loss) for seed, loss in enumerate((1.00, 1.02))),
        *(result("b", 60, seed, loss) for seed, loss in enumerate((1.10, 1.12))),
        *(result("b", 60, seed, loss, rate=2.0) for seed, loss in enumerate((1.30, 1.32))),  # a worse rate
        result("b", 60, 0, 0.5, rate=3.0),  # not all seeds are there
        *(result("c", 60, seed, loss) for seed, loss in enumerate((1.01, 1.02))),
    ]
    losses = run.best_rates(results)
    assert losses[60, "b"] == [1.10, 1.12]
    claims = {"x": ["a", "b", "c"], "y": ["b", "a"], "z": ["a", "d"]}
    methods = {name: {"train": "--init random" if name == "e" else ""} for name in "abcde"}
    plan = {"claims": claims, "methods": methods}
    rows = [(claim, what, said) for claim, what, _, _, said in run.judge(plan, losses)]
    assert rows == [
        ("x", "a < b", run.HOLDS),
        ("x", "a < c", run.OPEN),
        ("y", "b < a", run.FAILS),
        ("z", "a < d", run.NOT_RUN),
    ]
    # Seeds of runs from random weights say nothing of the others' spread.
    losses = {(60, "a"): [1.0], (60, "e"): [3.0, 4.0]}
    assert math.isnan(run.spread(plan, losses, 60, "a")) and run.spread(plan, losses, 60, "e") > 0.5
    assert run.verdict(1.0, math.nan) == run.OPEN


def test_agreement_is_what_seeds_share() -> None:
    early = [{"early": ["ffn:0:1", "ffn:1:2"]}, {"early": ["ffn:0:1", "ffn:1:3"]}, {"early": []}]
    assert run.agreement(early) == 0.5 and run.agreement(early[2:]) is None


def test_a_run_without_the_data_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("MEGATRON_PRUNE_DATA", raising=False)
    assert run.main(["--results", str(tmp_path)]) == 2
    assert "MEGATRON_PRUNE_DATA is unset" in capsys.readouterr().err
    assert run.main(["--results", str(tmp_path), "--collect"]) == 2
    assert "holds no results yet" in capsys.readouterr().err


def test_a_job_array_waits_for_what_it_needs(real_data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """As docs/reproduction.md spells it, against a stand-in for sbatch, which writes down what it is asked."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" ---- >> "{tmp_path}/asked"\necho 71\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("MEGATRON_PRUNE_DATA", str(real_data))
    places = ["--runs", str(tmp_path / "q's runs"), "--results", str(tmp_path / "results")]
    only = ["--only", "defaults", "scratch_found"]
    words = ["--subset", "medium", *only, *places, "--slurm"]
    assert run.main([*words, "--ntasks '1"]) == 2 and "No closing quotation" in capsys.readouterr().err
    assert run.main([*words, "--ntasks 1 -t 9"]) == 0
    output = capsys.readouterr().out
    assert output == "job 71: runs 0 to 3\njob 71: runs 4 to 7\njob 71: collects\n"
    first, second, last = (part.split("\n") for part in (tmp_path / "asked").read_text().split("\n----\n") if part)
    options, wait = ["--ntasks", "1", "-t", "9", "--wrap"], ["--dependency", "afterany:71"]
    assert first[:-1] == ["--parsable", "--array", "0-3", *options]
    assert second[:-1] == ["--parsable", "--array", "4-7", *wait, *options]
    assert last[:-1] == ["--parsable", *wait, *options]
    for asked, index in ((first, "$SLURM_ARRAY_TASK_ID"), (second, "$SLURM_ARRAY_TASK_ID"), (last, "-1")):
        inner = shlex.split(asked[-1])
        assert inner[-5:] == [*only, "--index", index] and f"--runs={tmp_path}/q's runs" in inner
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert run.main([*words, "--partition x"]) == 2
    assert "sbatch: error: invalid partition" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.timeout(600)
def test_runs_are_made_once_and_collected(real_data: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    """Three methods in ten steps: one that prunes, one that is cut first, one that waits for the first one's shape."""
    names = ("defaults", "llm_pruner", "scratch_found")
    content["methods"] = {name: content["methods"][name] for name in names}
    content["claims"] = {"pruning beats both": list(names)}
    content["subsets"] = {"tiny": {"steps": [10], "seeds": [1], "learning_rates": [6.0e-3]}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    words = ["--plan", "plan.yaml", "--subset", "tiny", "--runs", "runs", "--results", "results"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MEGATRON_PRUNE_DATA": str(real_data)}

    def made() -> str:
        command = [sys.executable, str(FOLDER / "run.py"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = made()
    assert first.count(": loss ") == 3 and "| pruning beats both | `defaults < llm_pruner` | 10 |" in first
    facts = [json.loads(file.read_text()) for file in sorted((tmp_path / "results").glob("*.json"))]
    assert all(one["parameters"] <= 130000 and one["tokens"] == 20480 for one in facts)
    assert str(real_data) not in json.dumps(facts) and "$MEGATRON_PRUNE_DATA" in json.dumps(facts)
    assert facts[0]["early"] and facts[0]["widths"] == facts[2]["widths"]
    assert (tmp_path / "results" / "loss_vs_tokens.png").is_file()
    (tmp_path / "results" / "llm_pruner_10_1_0.006.json").unlink()
    again = made()
    assert not list(tmp_path.glob("runs/*/iter_*")), "nothing reads them any more"
    assert again.count("done before") == 2 and again.count(": loss ") == 1
