"""The stages after training, as commands of this package; each runs in a process of its own.

export      checkpoint -> Hugging Face folder
evaluate    source and exported model side by side, on what the configuration names or the run's own validation data
page        the run's report.html anew, with what was measured
check       what can be known before training about whether `evaluate` will work
run         start one, see it through, end it when this process is told to leave
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.config import Config
from megatron_prune.errors import UserError
from megatron_prune.evaluation.tasks import lacking
from megatron_prune.launch.jobs.stages import EVALUATION, EXPORTED
from megatron_prune.runtime.places import search_path

_PROGRAM = (sys.executable, "-m", "megatron_prune")
_OF_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Job:
    """What a stage runs.

    Args:
        words: the command line; empty: nothing can be run.
        left_out: why the stage, or a part of it, is left out; None: it is complete.
    """

    words: tuple[str, ...]
    left_out: str | None = None


def export(config: Config) -> Job:
    """SAVE's newest checkpoint to SAVE/hf."""
    save = str(config.checkpoint.save)
    words = ("--load", save, "--save", str(Path(save) / EXPORTED), "--overwrite")
    return Job((*_PROGRAM, "convert-to-hf", *words))


def evaluate(config: Config) -> Job:
    """Source and exported model on data and tasks; without lm-eval on the data alone."""
    evaluation, save = config.evaluation, Path(str(config.checkpoint.save))
    wanted = _data_words(config)
    left_out = None
    if evaluation.eval_tasks and (names := lacking()) is not None:
        left_out = f"{names} is not installed (megatron-prune[eval]), which evaluation.eval_tasks needs"
    elif evaluation.eval_tasks:
        wanted += ["--tasks", evaluation.eval_tasks]
        wanted += ["--task-data", evaluation.eval_task_data] if evaluation.eval_task_data else []
    if not wanted:
        nothing = "there is no validation data to evaluate on (evaluation.eval_data_path, eval_tasks)"
        return Job((), left_out or nothing)
    if config.data.tokenizer_model:
        wanted += ["--tokenizer-model", config.data.tokenizer_model]
    models = [str(path) for path in (_source(config), save / EXPORTED) if path is not None]
    command = (*_PROGRAM, "evaluate", "--hf-model", *models, *wanted)
    return Job((*command, "--output-dir", str(save / EVALUATION)), left_out)


def page(config: Config) -> Job:
    """The run's page again, which training wrote before anything was evaluated; empty where none is wanted."""
    if not config.logging.report:
        return Job(())
    from megatron_prune.report.html_page import FILE_NAME, is_installed  # imports numpy, which launchers do without

    save = Path(str(config.checkpoint.save))
    if not is_installed():
        return Job(())
    return Job((*_PROGRAM, "report", str(save), "--output", str(save / FILE_NAME)))


def check(config: Config) -> str | None:
    """What `evaluate` will have to leave out, or None. Raises UserError: a task is unknown, or data that are named are
    not there."""
    evaluation = config.evaluation
    if evaluation.eval_tasks or evaluation.eval_data_path:
        from megatron_prune.evaluation.corpora import check_corpus
        from megatron_prune.evaluation.tasks import select_tasks

        try:
            for path in _separate(evaluation.eval_data_path):
                check_corpus(path)
            if evaluation.eval_tasks:
                select_tasks(evaluation.eval_tasks, evaluation.eval_task_data)
        except UserError as error:
            text = str(error)
            for flag in ("--tasks", "--task-data", "--data-path"):
                field = "eval_" + flag[2:].replace("-", "_")
                text = text.replace(flag, f"evaluation.{field} (--{field.replace('_', '-')})")
            raise UserError(text) from error
    return evaluate(config).left_out


def run(words: Sequence[str]) -> int:
    """Exit status of a command, started outside of this process's group of ranks."""
    environment = {k: v for k, v in os.environ.items() if k not in _OF_RANKS and not k.startswith("TORCHELASTIC")}
    environment["PYTHONPATH"] = search_path(environment)
    process = subprocess.Popen(words, env=environment)
    try:
        return process.wait()
    except BaseException:  # told to leave
        process.terminate()
        process.wait()
        raise


def _data_words(config: Config) -> list[str]:
    """The tool's options about data: those named for it, else the very samples that the run evaluates on."""
    data, training = config.data, config.training
    samples = str(training.eval_iters * training.global_batch_size)
    if config.evaluation.eval_data_path:
        paths = _separate(config.evaluation.eval_data_path)
        return [
            "--data-path",
            *paths,
            *(["--eval-samples", samples] if _is_blend(paths[0]) else []),
        ]  # a blend has no end
    if data.valid_data_path:
        path, split = data.valid_data_path, "0,1,0"
    elif data.data_path and float(data.split.split(",")[1]) > 0:
        path, split = data.data_path, data.split
    else:
        return []
    own = {"split": split, "seed": training.seed, "seq-length": data.seq_length, "eval-samples": samples}
    return ["--data-path", path, *(word for name, value in own.items() for word in (f"--{name}", str(value)))]


def _separate(paths: str | None) -> list[str]:
    """Data sets by themselves; a blend, `weight1 prefix1 weight2 prefix2`, is one of them."""
    from megatron_prune.data.datasets import blend_words

    if paths is None or Path(paths).is_file():
        return [paths] if paths else []
    words = blend_words(paths, "evaluation.eval_data_path (--eval-data-path)")
    try:
        float(words[0])
    except (IndexError, ValueError):
        return words
    return [paths]


def _is_blend(path: str) -> bool:
    from megatron_prune.data.datasets import blend_words

    return not Path(path).is_file() and len(blend_words(path)) > 1


def _source(config: Config) -> Path | None:
    """The source model's folder, when its weights are there to be evaluated too."""
    folder = config.model.hf_model
    if not folder or config.model.init != "source":
        return None
    return Path(folder) if [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")] else None
