"""Choosing tasks, and accuracies that are the harness's own to the last digit."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import UserError
from megatron_prune.evaluation.models import open_candidate
from megatron_prune.evaluation.tasks import TASKS, select_tasks
from megatron_prune.evaluation.zero_shot import HarnessOptions, Score, average, evaluate_tasks

from .conftest import WORDS
from .harness import DEFINITIONS, local, run_harness

SUBJECTS = ("abstract_algebra", "anatomy")


def documents(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random documents in the public schema of a task."""
    generator = random.Random(f"{task} {seed}")
    phrase = lambda most=6: " ".join(generator.choices(WORDS, k=generator.randint(2, most)))  # noqa: E731
    four = lambda: {"text": [phrase() for _ in range(4)], "label": list("ABCD")}  # noqa: E731
    make = {
        "arc": lambda: {"id": "x", "question": phrase(), "choices": four(), "answerKey": generator.choice("ABCD")},
        "boolq": lambda: {"passage": phrase(12), "question": phrase(), "label": generator.randint(0, 1)},
        "hellaswag": lambda: {
            "ctx_a": phrase(), "ctx_b": phrase(), "activity_label": "[title] Running",
            "endings": [phrase() for _ in range(4)], "label": str(generator.randint(0, 3)),
        },
        "openbookqa": lambda: {"question_stem": phrase(), "choices": four(), "answerKey": generator.choice("ABCD")},
        "piqa": lambda: {"goal": phrase(), "sol1": phrase(), "sol2": phrase(), "label": generator.randint(0, 1)},
        "winogrande": lambda: {
            "sentence": f"{phrase()} _ {phrase()}", "option1": "cat", "option2": "dog",
            "answer": generator.choice("12"),
        },
        "mmlu": lambda: {
            "question": phrase(), "choices": [phrase() for _ in range(4)], "answer": generator.randint(0, 3),
            "subject": generator.choice(SUBJECTS),
        },
    }[task.split("_")[0]]  # fmt: skip
    return [make() for _ in range(count)]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# Choosing -------------------------------------------------------------------------------------------------------------


def test_all_takes_what_there_are_files_for(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", documents("piqa", 2))
    write_jsonl(tmp_path / "arc_easy.json", documents("arc_easy", 2))
    (tmp_path / "boolq.parquet").touch()
    chosen, missing = select_tasks("all", str(tmp_path))
    assert [selected.task.name for selected in chosen] == ["arc_easy", "boolq", "piqa"]
    assert missing == ["arc_challenge", "hellaswag", "openbookqa", "winogrande", "mmlu_cloze"]
    online, none_missing = select_tasks("all", None)
    assert len(online) == len(TASKS) == 8 and none_missing == []
    assert [s.task.harness_name for s in online][-1] == "mmlu_continuation"


@pytest.mark.parametrize(
    "names, message",
    [
        ("pika", "pika is unknown; did you mean piqa?"),
        ("zzz", "zzz is unknown; use all or some of arc_challenge"),
        (" , ", "names no task"),
        ("piqa,boolq", "holds no file of boolq"),
        ("openbookqa", "line 1 lacks choices, answerKey; openbookqa is read in the public schema"),
        ("arc_easy", "line 1 is no JSON object"),
    ],
)
def test_mistakes_are_named_before_anything_runs(names: str, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", documents("piqa", 2))
    write_jsonl(tmp_path / "openbookqa.jsonl", [{"question_stem": "x"}])
    (tmp_path / "arc_easy.jsonl").write_text("question,answer\n")
    with pytest.raises(UserError) as error:
        select_tasks(names, str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_folder_of_tasks_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        select_tasks("piqa", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds no file of"):
        select_tasks("all", str(tmp_path))


def test_average_prefers_normalised_accuracy() -> None:
    scores = [
        Score("a", "acc", 0.2, 0.03, 10),
        Score("a", "acc_norm", 0.4, 0.03, 10),
        Score("b", "acc", 0.6, 0.04, 20),
    ]
    mean = average(scores)
    assert mean is not None and mean.value == pytest.approx(0.5) and mean.examples == 30
    assert mean.stderr == pytest.approx(math.hypot(0.03, 0.04) / 2)
    assert average(scores[:2]) is None


# Against the harness --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_accuracies_are_the_harness_s_to_the_last_digit(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: install megatron-prune[eval]")
    folder, data = model_folders[0], tmp_path / "data"
    data.mkdir()
    for task in TASKS:
        write_jsonl(data / f"{task.name}.jsonl", documents(task.name, 37))
    candidate = open_candidate(folder, "large", tmp_path)
    selection, missing = select_tasks("all", str(data))
    assert missing == []
    (tmp_path / "scratch").mkdir()
    scores = evaluate_tasks(candidate, selection, HarnessOptions("cpu", 5, dtype="float32"), tmp_path / "scratch")

    cache = tmp_path / "cache"
    definitions = [
        local(name, template, split, data / f"{name}.jsonl", cache) for name, (template, split) in DEFINITIONS.items()
    ]
    rows = documents("mmlu_cloze", 37)
    of_subject = {subject: [row for row in rows if row["subject"] == subject] for subject in SUBJECTS}
    for subject, theirs in of_subject.items():
        file = write_jsonl(tmp_path / f"{subject}.jsonl", theirs)
        definitions.append(local(subject, f"mmlu/continuation/mmlu_{subject}.yaml", "test", file, cache))
    expected = run_harness(folder, definitions, tmp_path / "theirs", 5)

    ours = {(score.task, score.metric): score for score in scores}
    compared = 0
    for name in DEFINITIONS:
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in expected[name]:
                score = ours[name, metric]
                assert score.value == expected[name][f"{metric},none"], (name, metric)
                assert score.stderr == expected[name][f"{metric}_stderr,none"], (name, metric)
                assert score.examples == 37
                compared += 1
    assert compared == 12  # BoolQ and WinoGrande have one metric, the others two
    right = {m: sum(expected[s][f"{m},none"] * len(of_subject[s]) for s in SUBJECTS) for m in ("acc", "acc_norm")}
    for metric, count in right.items():  # MMLU: the mean over questions of the harness's own subjects
        assert ours["mmlu_cloze", metric].value == pytest.approx(count / 37, abs=1e-12)


def test_an_answer_longer_than_the_model_takes_is_said(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: install megatron-prune[eval]")
    candidate = open_candidate(model_folders[0], "large", tmp_path)
    rows = documents("piqa", 2)
    rows[1]["sol2"] = " ".join(WORDS * candidate.max_length)
    write_jsonl(tmp_path / "piqa.jsonl", rows)
    selection, _ = select_tasks("piqa", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(UserError, match=f"longer than the {candidate.max_length} tokens the model takes"):
        evaluate_tasks(candidate, selection, HarnessOptions("cpu", 5, dtype="float32"), tmp_path / "scratch")
