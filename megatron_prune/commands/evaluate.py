"""Judge models side by side: perplexity on any text or data set, and the paper's zero-shot tasks.

    megatron-prune evaluate --hf-model source pruned baseline --data-path held_out.txt \\
        --tasks arc_easy,piqa --task-data bench --output-dir results
    megatron-prune evaluate --load checkpoints/run         # what the run itself evaluates on
    megatron-prune evaluate --load checkpoints/run --tasks all

A checkpoint is exported into a temporary folder first, so that what is judged is what convert-to-hf gives.
The tables go to stdout, and with --output-dir also to evaluation.md and evaluation.json, which grow task by task. A
task that cannot be run is a row that says why, and exit status 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_prune.commands.running import run_command, say
from megatron_prune.config.options import filled, option
from megatron_prune.data.documents import SEPARATORS
from megatron_prune.errors import UserError

if TYPE_CHECKING:
    from megatron_prune.evaluation.corpora import Corpus, IndexedOptions
    from megatron_prune.evaluation.models import ModelFolder
    from megatron_prune.evaluation.side_by_side import Evaluated, Report
    from megatron_prune.evaluation.tasks import Selected

DTYPES = ("float32", "bfloat16", "float16")
LONGEST = 2048  # tokens of a window, unless --seq-length says otherwise


@dataclass(frozen=True)
class EvaluationOptions:
    """The command's options: models, perplexity, zero-shot tasks."""

    hf_model: tuple[str, ...] = option((), "Hugging Face folders, one column each", metavar="DIR")
    load: str | None = option(None, "a run's folder, or one of its iter_... folders; one more column", metavar="DIR")
    ckpt_step: int | None = option(None, "iteration of --load; the newest unless given")
    tokenizer_model: str | None = option(None, "tokenizer of the models whose folder holds none", metavar="PATH")
    dtype: str | None = option(
        None, "float32, bfloat16 or float16 to compute in; as stored unless given", metavar="T", choices=DTYPES
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; cuda where there is one, unless given", metavar="D")
    batch_size: int = option(8, "sequences at once", at_least=1)
    add_bos: bool | None = option(
        None, "begin prompts and documents with the begin-of-sequence id; as each tokenizer does unless given"
    )
    trust_remote_code: bool = option(False, "run code that a model's folder brings along")
    data_path: tuple[str, ...] = option(
        (),
        'text files, .jsonl files, prefixes of .bin/.idx data sets, or quoted blends "w1 p1 w2 p2"; with --load '
        "alone, the run's own validation data",
        metavar="P",
    )
    seq_length: int | None = option(None, f"of a window; {LONGEST}, or the model's context if that is less", at_least=1)
    split: str = option("0,1,0", "of .bin/.idx data: training, validation, test; validation is measured")
    seed: int = option(1234, "of .bin/.idx data's shuffle; a run's --seed")
    eval_samples: int | None = option(None, "windows of each data set; all of them unless given", at_least=1)
    document_separator: str = option(SEPARATORS[0], "what ends a document of a text file", choices=SEPARATORS)
    json_key: str = option("text", "where a JSON line holds its text", metavar="KEY")
    append_eod: bool = option(False, "end every document of a text with the end-of-sequence id")
    tasks: str | None = option(
        None,
        "all, or some of arc_challenge,arc_easy,boolq,hellaswag,openbookqa,piqa,winogrande,mmlu_cloze",
        metavar="T",
    )
    task_data: str | None = option(
        None, "folder of TASK.jsonl or TASK.parquet files; downloaded unless given", metavar="DIR"
    )
    limit: int | None = option(None, "documents of each task at most", at_least=1)
    output_dir: str | None = option(None, "also write evaluation.md and evaluation.json there", metavar="DIR")


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured on every model; `own` is the validation data of the run in --load, with its sequence length."""

    arguments: EvaluationOptions
    device: str
    scratch: Path
    selection: tuple[Selected, ...]
    own: tuple[IndexedOptions, int] | None
    keep: Callable[[Evaluated], None]  # told of what there is of the model at hand


def evaluate(arguments: EvaluationOptions, scratch: Path) -> Report:
    """Measure everything that was asked for. Raises UserError."""
    import torch

    from megatron_prune.evaluation.corpora import check_corpus, is_text
    from megatron_prune.evaluation.models import open_candidate
    from megatron_prune.evaluation.side_by_side import Report, write_report
    from megatron_prune.evaluation.tasks import select_tasks
    from megatron_prune.evaluation.zero_shot import harness_version
    from megatron_prune.runtime.folders import probe_folder

    check(arguments)
    if arguments.output_dir:
        probe_folder(arguments.output_dir, "--output-dir")
    selection, missing = select_tasks(arguments.tasks, arguments.task_data) if arguments.tasks else ([], [])
    settings = {name: value for name, value in sorted(dataclasses.asdict(arguments).items()) if name != "output_dir"}
    if selection:
        settings["lm_eval"] = harness_version()
    for path in arguments.data_path:
        check_corpus(path, arguments.document_separator, arguments.json_key)  # told before anything is computed
    folders, own = model_folders(arguments, scratch)
    candidates = []
    for number, (name, folder) in enumerate(folders.items()):
        (scratch / str(number)).mkdir()
        candidate = open_candidate(folder, name, scratch / str(number), arguments.tokenizer_model)
        if candidate.brings_code and not arguments.trust_remote_code:
            raise UserError(f"{folder}: brings code of its own; --trust-remote-code runs it")
        if candidate.tokenizer_folder is None and (selection or any(map(is_text, arguments.data_path))):
            raise UserError(f"{candidate.folder}: holds no tokenizer; name one with --tokenizer-model")
        candidates.append(candidate)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    remarks = [f"Left out for want of a file in --task-data: {', '.join(missing)}."] if missing else []
    finished: list[Evaluated] = []

    def report(*current: Evaluated) -> Report:
        return Report((*finished, *current), settings, tuple(remarks))

    def keep(current: Evaluated) -> None:
        if arguments.output_dir:
            write_report(report(current), arguments.output_dir)

    plan = EvaluationPlan(arguments, device, scratch, tuple(selection), own, keep)
    for candidate in candidates:
        finished.append(judge(candidate, plan))
        if arguments.output_dir:
            write_report(report(), arguments.output_dir)
    return report()


def check(arguments: EvaluationOptions) -> None:
    """Refuse what cannot be meant. Raises UserError."""
    import torch

    if not arguments.hf_model and not arguments.load:
        raise UserError("name a model: --hf-model DIR, or --load DIR for a checkpoint")
    if arguments.hf_model and not arguments.data_path and not arguments.tasks:
        raise UserError("say what to measure: --data-path, --tasks, or both")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {arguments.device}: cannot be used here: {reason}") from error


def model_folders(
    arguments: EvaluationOptions, scratch: Path
) -> tuple[dict[str, Path], tuple[IndexedOptions, int] | None]:
    """(name -> folder of every model, the run's own validation data if that is to be measured)."""
    from megatron_prune.evaluation.corpora import run_options
    from megatron_prune.evaluation.models import export_checkpoint

    folders: dict[str, Path] = {}
    for given in arguments.hf_model:
        path = Path(os.path.abspath(given))  # a link keeps its name
        name = path.name if path.name not in folders else f"{path.parent.name}/{path.name}"
        if name in folders:
            raise UserError(f"--hf-model {given}: is named twice")
        folders[name] = path
    if not arguments.load:
        return folders, None
    name, meta = export_checkpoint(arguments.load, arguments.ckpt_step, scratch / "export", arguments.tokenizer_model)
    folders[name] = scratch / "export"
    wanted = not arguments.data_path and not arguments.tasks
    return folders, run_options(meta, arguments.load) if wanted else None


def judge(candidate: ModelFolder, plan: EvaluationPlan) -> Evaluated:
    """Everything about one model; at no time are two of them in memory."""
    from megatron_prune.evaluation.models import describe
    from megatron_prune.evaluation.side_by_side import Evaluated
    from megatron_prune.evaluation.zero_shot import Failure, HarnessOptions, Score, evaluate_tasks

    arguments = plan.arguments
    perplexities = measure_all(candidate, plan) if arguments.data_path or plan.own else []
    scores: list[Any] = []

    def so_far(results: Sequence[Any]) -> Evaluated:
        scored = tuple(one for one in results if isinstance(one, Score))
        failed = tuple(one for one in results if isinstance(one, Failure))
        return Evaluated(describe(candidate, arguments.dtype), tuple(perplexities), scored, failed)

    if plan.selection:
        stream, tasks = sys.stderr, len(plan.selection)
        numbers = iter(range(1, tasks + 1))
        options = filled(HarnessOptions, arguments, device=plan.device)

        def begun(task: str) -> None:
            say(f"{candidate.name}: task {next(numbers)} of {tasks}, {task}", stream)

        scores = evaluate_tasks(
            candidate, plan.selection, options, plan.scratch, begun, lambda results: plan.keep(so_far(results))
        )
    return so_far(scores)


def measure_all(candidate: ModelFolder, plan: EvaluationPlan) -> list[Any]:
    """Perplexities of one model on all data sets."""
    from megatron_prune.evaluation.models import load_model
    from megatron_prune.evaluation.perplexity import measure

    arguments = plan.arguments
    corpora = all_corpora(candidate, plan)  # first: a data set that does not fit is told before the model is loaded
    model = load_model(candidate, plan.device, arguments.dtype, arguments.trust_remote_code)
    found = []
    for corpus in corpora:
        words = f"{candidate.name}, {corpus.name}"
        with tqdm(total=len(corpus.windows), unit="window", desc=words, disable=not sys.stderr.isatty()) as bar:
            found.append(measure(model, corpus, arguments.batch_size, plan.device, bar.update))
    return found


def all_corpora(candidate: ModelFolder, plan: EvaluationPlan) -> list[Corpus]:
    """The data sets, as this model's tokenizer reads them."""
    from megatron_prune.evaluation.corpora import IndexedOptions, TextOptions, indexed_corpus, is_text, text_corpus

    arguments, cache = plan.arguments, plan.scratch / "indices"
    if plan.own is not None:
        options, length = plan.own
        return [indexed_corpus(options, candidate, arguments.seq_length or length, cache)]
    length = arguments.seq_length or min(LONGEST, candidate.max_length)
    corpora = []
    for path in arguments.data_path:
        if is_text(path):
            bos = candidate.adds_bos() if arguments.add_bos is None else arguments.add_bos
            text = filled(TextOptions, arguments, path=path, prepend_bos=bos, samples=arguments.eval_samples)
            corpora.append(text_corpus(text, candidate.tokenizer(), length, candidate.vocab_size))
        else:
            indexed = IndexedOptions(path, arguments.split, arguments.seed, arguments.eval_samples)
            corpora.append(indexed_corpus(indexed, candidate, length, cache))
    return corpora


def judge_all(arguments: EvaluationOptions) -> int:
    """Evaluate, print, write; the exit status. Raises UserError."""
    from megatron_prune.data.leftovers import scratch_folder, sole_writer
    from megatron_prune.evaluation.side_by_side import JSON_NAME, write_report

    with contextlib.ExitStack() as held:
        scratch = held.enter_context(scratch_folder())
        if arguments.output_dir:
            held.enter_context(sole_writer(Path(arguments.output_dir) / JSON_NAME, "--output-dir"))
        report = evaluate(arguments, scratch)
        say(report.to_markdown().rstrip("\n"))
        if arguments.output_dir:
            for file in write_report(report, arguments.output_dir):
                say(f"written: {file}", sys.stderr)
    failed = sum(len(entry.failures) for entry in report.models)
    if failed:
        say(f"{failed} tasks could not be run, see the table", sys.stderr)
    return 1 if failed else 0


main = partial(run_command, "evaluate", EvaluationOptions, judge_all)
