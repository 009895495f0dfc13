"""The paper's eight zero-shot tasks: which there are, and local files of them.

    TASKS           our names, the harness's, and what a local file of the task looks like
    select_tasks    --tasks and --task-data -> tasks, each with its local file if there is one
    lacking         what of lm-evaluation-harness is not installed

Local files are JSON lines (`.jsonl`, `.json`) or Parquet (`.parquet`), named after the task, in the schema of the
public data set.
"""

import difflib
import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prune.errors import UserError
from megatron_prune.reading import open_file

ALL = "all"
SUFFIXES = (".jsonl", ".json", ".parquet")
# What lm-evaluation-harness needs to run a model; it requires itself only some of what its `hf` model imports.
_PACKAGES = ("lm_eval", "accelerate", "datasets")


@dataclass(frozen=True)
class Task:
    """One of the tasks.

    Attributes:
        name: of ours, and of the local file.
        harness_name: of the harness's task or group.
        template: the harness's task whose definition local files are run by.
        folder: where in the harness's `tasks` folder that definition is.
        split: the public split that is scored.
        fields: what every line of a local file must hold.
        changes: to the definition, for local files.
    """

    name: str
    harness_name: str
    template: str
    folder: str
    split: str
    fields: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


_QUESTION = ("question", "choices", "answerKey")
_MMLU_CHANGES = {
    "description": "The following are questions (with answers) about {{subject.replace('_', ' ')}}.\n\n",
    "fewshot_config": None,
}
TASKS = (
    Task("arc_challenge", "arc_challenge", "arc_challenge", "arc", "test", _QUESTION),
    Task("arc_easy", "arc_easy", "arc_easy", "arc", "test", _QUESTION),
    Task("boolq", "boolq", "boolq", "super_glue/boolq", "validation", ("passage", "question", "label")),
    Task(
        "hellaswag",
        "hellaswag",
        "hellaswag",
        "hellaswag",
        "validation",
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
    ),
    Task("openbookqa", "openbookqa", "openbookqa", "openbookqa", "test", ("question_stem", "choices", "answerKey")),
    Task("piqa", "piqa", "piqa", "piqa", "validation", ("goal", "sol1", "sol2", "label")),
    Task(
        "winogrande",
        "winogrande",
        "winogrande",
        "winogrande",
        "validation",
        ("sentence", "option1", "option2", "answer"),
    ),
    Task(
        "mmlu_cloze",
        "mmlu_continuation",
        "mmlu_abstract_algebra_continuation",
        "mmlu/continuation",
        "test",
        ("subject", "question", "choices", "answer"),
        _MMLU_CHANGES,
    ),
)


@dataclass(frozen=True)
class Selected:
    """A task to run, and its local file; None takes the documents from where the harness does."""

    task: Task
    file: Path | None


def select_tasks(names: str, task_data: str | None) -> tuple[list[Selected], list[str]]:
    """(the tasks, names left out because `all` was asked for and they have no local file).

    Args:
        names: task names with commas between, or `all`.
        task_data: folder of local files; None: the harness downloads.

    Raises:
        UserError: a name is unknown, or a file is missing or of another schema.
    """
    wanted = _named(names)
    if task_data is None:
        return [Selected(task, None) for task in wanted], []
    folder = Path(task_data)
    if not folder.is_dir():
        raise UserError(f"--task-data {task_data}: is no folder; name the one that holds piqa.jsonl and the like")
    files = {task.name: _local_file(folder, task.name) for task in wanted}
    missing = [name for name, file in files.items() if file is None]
    if missing and (names.strip() != ALL or len(missing) == len(files)):
        raise UserError(
            f"--task-data {task_data}: holds no file of {', '.join(missing)}; looked for "
            f"{missing[0]}{{{','.join(SUFFIXES)}}}"
        )
    chosen = [Selected(task, file) for task in wanted if (file := files[task.name]) is not None]
    for selected in chosen:
        _check_schema(selected)
    return chosen, missing


def _named(names: str) -> list[Task]:
    known = {task.name: task for task in TASKS}
    if names.strip() == ALL:
        return list(TASKS)
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise UserError(f"--tasks: names no task; use {ALL} or some of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"use {ALL} or some of {', '.join(known)}"
            raise UserError(f"--tasks: {name} is unknown; {hint}")
    return [known[name] for name in wanted]


def _local_file(folder: Path, name: str) -> Path | None:
    for suffix in SUFFIXES:
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    return None


def _check_schema(selected: Selected) -> None:
    """Look at every line, so that another schema or a broken end is a clear error before a model is loaded."""
    file, task = selected.file, selected.task
    if file is None or file.suffix == ".parquet":
        return
    number = 1
    try:
        with io.TextIOWrapper(open_file(file), encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    _check_line(json.loads(line), f"{file}: line {number}", task)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {number} is no JSON object ({error}); one per line is needed") from error
    if not file.stat().st_size:
        raise UserError(f"{file}: line 1 is no JSON object (the file is empty); one per line is needed")


def _check_line(found: Any, where: str, task: Task) -> None:
    missing = [name for name in task.fields if not isinstance(found, dict) or name not in found]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)}; {task.name} is read in the public schema ({', '.join(task.fields)})"
        )


def lacking() -> str | None:
    """Names of the packages of megatron-prune[eval] that are not installed, or None where nothing lacks; asked without
    importing any of them."""
    return ", ".join(name for name in _PACKAGES if importlib.util.find_spec(name) is None) or None
