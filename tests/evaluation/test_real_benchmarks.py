"""megatron-prune evaluate on real benchmark files and a real model, next to lm-evaluation-harness by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.commands import evaluate
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.export import export
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM

from .harness import DEFINITIONS, local, run_harness

TASKS = ("arc_easy", "boolq", "openbookqa", "piqa")
LIMIT = 25  # documents of each
GROUPS = (Group.of(HEAD, ((1,), (2,), (0,), (7,), (3,))), Group.of(FFN, ((3,),) * 5), Group.of(STEM, ((5,),)))


def exported(source: Path, save: Path, groups: tuple[Group, ...]) -> Path:
    """The model without these units, as megatron-prune convert-to-hf writes it."""
    architecture = Architecture.full(read_shape(source))
    for group in groups:
        architecture = architecture.without(group)
    weights = live_view(FolderWeights(source), architecture)
    export(weights, architecture, save, tokenizer_model=str(source / "tokenizer.model"))
    return save


@pytest.mark.timeout(600)
def test_accuracies_on_real_files_are_the_harness_s_to_the_last_digit(
    stories260k: Path, real_data: Path, tmp_path: Path
) -> None:
    """The source, whose folder holds a bare SentencePiece file, and a model with uneven heads, side by side."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: install megatron-prune[eval]")
    bench = real_data / "bench"
    models = {
        "stories260K": exported(stories260k, tmp_path / "whole", ()),
        "pruned": exported(stories260k, tmp_path / "pruned", GROUPS),
    }
    named = ["--hf-model", str(stories260k), str(models["pruned"]), "--batch-size", "16", "--device", "cpu"]
    tasks = ["--tasks", ",".join(TASKS), "--task-data", str(bench), "--limit", str(LIMIT)]
    assert evaluate.main([*named, *tasks, "--output-dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [model["name"] for model in report["models"]] == list(models)
    for model in report["models"]:
        name = model["name"]
        definitions = [local(task, *DEFINITIONS[task], bench / f"{task}.jsonl", tmp_path / "cache") for task in TASKS]
        theirs = run_harness(models[name], definitions, tmp_path / f"{name}_yaml", 16, LIMIT)
        expected = {
            (task, metric): (theirs[task][f"{metric},none"], theirs[task][f"{metric}_stderr,none"], LIMIT)
            for task in TASKS
            for metric in ("acc", "acc_norm")
            if f"{metric},none" in theirs[task]
        }
        ours = {(s["task"], s["metric"]): (s["value"], s["stderr"], s["examples"]) for s in model["tasks"]}
        assert len(ours) == 7 and ours == expected  # BoolQ has one metric, the others two
    first, second = ([score["value"] for score in model["tasks"]] for model in report["models"])
    assert first != second, "two models of different weights cannot agree everywhere"
