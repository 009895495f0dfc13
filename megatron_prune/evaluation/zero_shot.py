"""Zero-shot tasks by lm-evaluation-harness: its task definitions and its `hf` model, unchanged.

    evaluate_tasks  a model on tasks (see `tasks`) -> `Score` per task and metric
    average         over tasks, in the metric that each is usually reported in

For a local file the harness's YAML is included in one that changes only where the documents come from. MMLU is the
cloze form (the answers' texts are scored, not their letters), the harness's `mmlu_continuation`; its local file holds
all subjects, each line naming its own, so that the accuracy is the mean over questions, as the harness's group has it.
"""

import contextlib
import importlib.metadata
import io
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.errors import UserError
from megatron_prune.evaluation.models import ModelFolder
from megatron_prune.evaluation.tasks import Selected, Task, lacking
from megatron_prune.runtime.folders import write_file

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Score:
    """An accuracy between 0 and 1, with the harness's standard error (None for one document), over `examples`."""

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int


@dataclass(frozen=True)
class Failure:
    """A task that could not be run, and why, in one line."""

    task: str
    reason: str


@dataclass(frozen=True)
class HarnessOptions:
    """How the harness runs a model.

    Attributes:
        device, dtype: torch's names; dtype None: as stored.
        batch_size: requests at once.
        limit: documents of every task at most.
        add_bos: begin every prompt with the begin-of-sequence id; None: what the tokenizer does by itself.
    """

    device: str
    batch_size: int
    dtype: str | None = None
    limit: int | None = None
    add_bos: bool | None = None
    trust_remote_code: bool = False


def harness_version() -> str:
    """The installed version. Raises UserError: it is not installed, or one of the packages that its model imports."""
    if (names := lacking()) is not None:
        raise UserError(
            f"--tasks needs lm-evaluation-harness and its packages, of which {names} is not installed: "
            "install megatron-prune[eval]"
        )
    return importlib.metadata.version("lm_eval")


def evaluate_tasks(
    candidate: ModelFolder,
    selection: Sequence[Selected],
    options: HarnessOptions,
    scratch: Path,
    on_task: Callable[[str], Any] = lambda _: None,
    on_result: Callable[[Sequence[Score | Failure]], Any] = lambda _: None,
) -> list[Score | Failure]:
    """Run a model on tasks, in the harness's own `hf` model.

    Args:
        scratch: a folder for generated YAML and the harness's copies of local files.
        on_task: told each task's name when it begins.
        on_result: told what there is so far, each time a task has ended.

    Returns:
        Scores, and a failure for each task that the harness cannot run; the others go on.

    Raises:
        UserError: the harness or the tokenizer is missing.
    """
    harness_version()
    if candidate.tokenizer_folder is None:
        raise UserError(f"{candidate.folder}: holds no tokenizer; name one with --tokenizer-model")
    with _quiet():
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        datasets.disable_progress_bars()
        model = _harness_model(candidate, options)
        # The index of the harness's thousands of tasks takes seconds; local files name theirs by path.
        manager = TaskManager(include_defaults=any(selected.file is None for selected in selection))
        scores: list[Score | Failure] = []
        for selected in selection:
            on_task(selected.task.name)
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=[_specification(selected, scratch)],
                    task_manager=manager,
                    limit=options.limit,
                    log_samples=False,
                )
            except Exception as error:  # datasets, jinja and the task's own code raise whatever they like
                where = selected.file or "its documents, which the harness downloads (--task-data names local files)"
                reason = _reason(error, candidate.max_length)
                scores.append(Failure(selected.task.name, f"the harness cannot run {where}: {reason}"))
            else:
                scores.extend(_scores(selected.task, results))
            on_result(scores)
    return scores


def _harness_model(candidate: ModelFolder, options: HarnessOptions) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(candidate.folder),
        tokenizer=str(candidate.tokenizer_folder),
        device=options.device,
        dtype=options.dtype or candidate.dtype,
        batch_size=options.batch_size,
        add_bos_token=options.add_bos,
        trust_remote_code=options.trust_remote_code,
    )


def _reason(error: Exception, max_length: int) -> str:
    """What went wrong in the harness, in one line; its assertions say nothing themselves."""
    if isinstance(error, AssertionError) and not str(error):
        failed = traceback.extract_tb(error.__traceback__)[-1].line or "an assertion"
        if "max_length" in failed:
            return f"an answer is longer than the {max_length} tokens the model takes; leave this task out"
        return f"{failed!r} does not hold"
    return (str(error) or type(error).__name__).partition("\n")[0]


def _specification(selected: Selected, scratch: Path) -> str:
    """What the harness calls the task: its own name, or a YAML file that reads the local documents."""
    task, file = selected.task, selected.file
    if file is None:
        return task.harness_name
    definition: dict[str, Any] = {
        "include": str(_definition(task)),
        "task": task.name,
        "dataset_path": "parquet" if file.suffix == ".parquet" else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {task.split: str(file.resolve())}, "cache_dir": str(scratch / "documents")},
        **dict.fromkeys(_SPLITS),
        f"{task.split}_split": task.split,
        **task.changes,
    }
    path = scratch / f"{task.name}.yaml"
    write_file(path, yaml.safe_dump(definition, sort_keys=False).encode(), lasting=False)
    return str(path)


def _definition(task: Task) -> Path:
    """The harness's YAML file of the task's template."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / task.folder
    names = (f"task: {task.template}", f'"task": "{task.template}"')
    for file in sorted(folder.rglob("*.yaml")):
        if any(line.strip() in names for line in file.read_text(encoding="utf-8").splitlines()):
            return file
    raise UserError(
        f"task {task.name}: lm-evaluation-harness {harness_version()} defines no {task.template} in {folder}; "
        "use another version"
    )


def _scores(task: Task, results: Mapping[str, Any]) -> list[Score]:
    """Accuracies of a task or group from the harness's results."""
    name = task.name if task.name in results["results"] else task.harness_name
    found = results["results"][name]
    counts = results["n-samples"]
    examples = counts[name]["effective"] if name in counts else sum(count["effective"] for count in counts.values())
    scores = []
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in found:
            stderr = found.get(f"{metric}_stderr,none")
            has_stderr = isinstance(stderr, float) and math.isfinite(stderr)
            scores.append(
                Score(task.name, metric, float(found[f"{metric},none"]), stderr if has_stderr else None, examples)
            )
    return scores


def average(scores: Sequence[Score]) -> Score | None:
    """The mean over tasks, of acc_norm where a task has it and else acc; None with fewer than two tasks."""
    chosen = {score.task: score for score in scores}  # acc_norm comes after acc
    if len(chosen) < 2:
        return None
    errors = [score.stderr for score in chosen.values()]
    stderr = None
    if all(error is not None for error in errors):
        stderr = math.sqrt(math.fsum((error or 0.0) ** 2 for error in errors)) / len(errors)
    value = math.fsum(score.value for score in chosen.values()) / len(chosen)
    return Score("average", "mean", value, stderr, sum(score.examples for score in chosen.values()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's and its libraries' chatter below errors out of the log, and progress bars out of files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm-eval", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()  # what goes wrong is raised
    try:
        with contextlib.redirect_stderr(stream):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
