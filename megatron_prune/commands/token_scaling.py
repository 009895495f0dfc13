"""Compare runs that differ in how many tokens pruning took: a table, and the paper's Figures 5 and 2.

    megatron-prune token-scaling --runs runs/ratio_* --output-dir runs

Reads what each run measured (`summary.json`; `config.yaml` for the ratio; accuracy from `evaluation/evaluation.json`,
where there is one) and writes token_scaling.md, token_scaling.json and, with matplotlib, two figures:
`loss_vs_tokens.png` (Figure 5: by pruning tokens) and `loss_vs_parameters.png` (Figure 2: by parameters, from the
source to each result). Runs that have not reached their end yet are left out, and named.

    Run        what one run measured
    read_run   folder -> Run, or why it has no say yet
    markdown   runs -> table
    draw       runs -> figures
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.fields import check_fields
from megatron_prune.checkpoint.record import STATE_FIELDS
from megatron_prune.commands.running import run_command, say
from megatron_prune.config import load_plain_yaml
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.model import first_format
from megatron_prune.model.kinds import find_kind
from megatron_prune.pruning.history import widest
from megatron_prune.reading import read_words
from megatron_prune.runtime.folders import replace_figure, replace_file

FIRST, LAST = ("ratio", "pruning tokens", "all tokens", "parameters"), ("loss at the target", "final loss")


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        ratio: pruning steps : gradient steps, or the curve. pruning_tokens: when the target was reached; tokens: all.
        source, pruned, final: the stages' facts (see `RunState.stages`); accuracy: zero-shot average, or None.
    """

    name: str
    ratio: str
    pruning_tokens: int
    tokens: int
    source: dict[str, Any]
    pruned: dict[str, Any]
    final: dict[str, Any]
    accuracy: float | None = None


def read_run(folder: Path) -> Run | str:
    """A run, or the reason why it has nothing to compare yet. Raises UserError: a file is not what a run writes."""
    summary, config = folder / "summary.json", folder / "config.yaml"
    if not summary.is_file():
        return "no summary.json: the run has not ended yet"
    try:
        facts = json.loads(read_words(summary))
        stages = facts["stages"]
        check_fields(facts, {"stages": STATE_FIELDS["stages"]}, summary, required=True)
        pruning = (load_plain_yaml(read_words(config)) or {}).get("pruning", {})
        ratio = str(pruning.get("ratio", "?"))
        if pruning.get("schedule") == "curve":
            ratio = f"{pruning['curve']['shape']} to {pruning['curve']['end']}"
        if "source" not in stages:
            return "nothing was measured: set training.eval_interval"
        if "pruned" not in stages:
            return "the target is not reached yet"
        if "final" not in stages:
            return "training is not finished yet"
        return Run(
            name=folder.name,
            ratio=ratio,
            pruning_tokens=int(stages["pruned"]["tokens"]),
            tokens=int(facts["consumed_tokens"]),
            source=stages["source"],
            pruned=stages["pruned"],
            final=stages["final"],
            accuracy=_accuracy(folder / "evaluation" / "evaluation.json"),
        )
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{folder}: not what a run writes ({type(error).__name__}: {error})") from error


def _accuracy(path: Path) -> float | None:
    """Zero-shot average of the last model in the report: the pruned one."""
    if not path.is_file():
        return None
    average = json.loads(read_words(path))["models"][-1]["average"]
    return None if average is None else float(average["value"])


def markdown(runs: Sequence[Run]) -> str:
    """A table; the fewest pruning tokens first."""
    has_accuracy = any(run.accuracy is not None for run in runs)
    source = runs[0].source
    widths = [find_kind(name).title for name in first_format.stage(source)["widths"]]
    rows = [[*FIRST, *widths, *LAST, *(["accuracy"] if has_accuracy else [])]]
    blank = ["", "", ""] if has_accuracy else ["", ""]
    rows.append(["source", "0", "0", *_widths(source), _loss(source), *blank[1:]])
    for run in runs:
        accuracy = [] if not has_accuracy else ["" if run.accuracy is None else f"{run.accuracy:.4f}"]
        tokens = [f"{run.pruning_tokens:,}", f"{run.tokens:,}"]
        rows.append([run.ratio, *tokens, *_widths(run.final), _loss(run.pruned), _loss(run.final), *accuracy])
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * columns[0], *("-" * (width - 1) + ":" for width in columns[1:])]
    lines = [rows[0], rule, *rows[1:]]
    return "".join("| " + " | ".join(cell.rjust(w) for cell, w in zip(row, columns)) + " |\n" for row in lines)


def _widths(stage: dict[str, Any]) -> list[str]:
    widths = first_format.stage(stage)["widths"]
    return [f"{stage['parameters']:,}", *(f"{widest(width)}" for width in widths.values())]


def _loss(stage: dict[str, Any]) -> str:
    return f"{stage['validation_loss']:.4f}"


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The two figures; needs matplotlib."""
    from matplotlib.figure import Figure

    by_tokens = Figure(figsize=(6.4, 4), layout="constrained")
    axes = by_tokens.add_subplot(
        xlabel="tokens until the target", ylabel="validation loss (nats per token)", xscale="log"
    )
    tokens = [run.pruning_tokens for run in runs]
    axes.plot(tokens, [run.pruned["validation_loss"] for run in runs], "o--", label="on reaching the target")
    axes.plot(tokens, [run.final["validation_loss"] for run in runs], "o-", label="after continued training")
    for run in runs:
        axes.annotate(run.ratio, (run.pruning_tokens, run.final["validation_loss"]), (0, 6), textcoords="offset points")
    if any(run.accuracy is not None for run in runs):
        other = axes.twinx()
        other.set_ylabel("zero-shot accuracy")
        measured = [(run.pruning_tokens, run.accuracy) for run in runs if run.accuracy is not None]
        other.plot(*zip(*measured), "s:", color="tab:green", label="accuracy")
        other.legend(loc="lower left")
    axes.legend()

    by_parameters = Figure(figsize=(6.4, 4), layout="constrained")
    axes = by_parameters.add_subplot(xlabel="parameters", ylabel="validation loss (nats per token)")
    source = runs[0].source
    axes.plot([source["parameters"]], [source["validation_loss"]], "k*", markersize=11, label="source")
    for run in runs:
        points = [(stage["parameters"], stage["validation_loss"]) for stage in (run.source, run.pruned, run.final)]
        axes.plot(*zip(*points), ".-", linewidth=1, label=f"{run.ratio}: {run.pruning_tokens:,} tokens")
    axes.legend()

    paths = [folder / "loss_vs_tokens.png", folder / "loss_vs_parameters.png"]
    for figure, path in zip((by_tokens, by_parameters), paths):
        replace_figure(path, figure, dpi=100)
    return paths


def collect(folders: Sequence[Path], output: Path) -> str:
    """Read, write everything, and return the table. Raises UserError when no run has anything to compare."""
    runs, remarks = [], []
    for folder in folders:
        found = read_run(folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            remarks.append(f"{folder.name}: left out, {found}")
    if not runs:
        raise UserError(f"--runs: no finished run; {'; '.join(remarks) or 'none is given'}")
    runs.sort(key=lambda run: run.pruning_tokens)
    text = markdown(runs)
    output.mkdir(parents=True, exist_ok=True)
    facts = json.dumps([dataclasses.asdict(run) for run in runs], indent=1) + "\n"
    replace_file(output / "token_scaling.md", text.encode())
    replace_file(output / "token_scaling.json", facts.encode())
    if find_spec("matplotlib") is not None:
        draw(runs, output)
    else:
        remarks.append("matplotlib is not installed: no figures")
    return "\n".join([text, *remarks])


@dataclass(frozen=True)
class ScalingOptions:
    """The command's options."""

    runs: tuple[str, ...] = option((), "folders that runs saved to", metavar="DIR", required=True)
    output_dir: str = option(None, "where table and figures go", metavar="DIR", required=True)


def compare(arguments: ScalingOptions) -> int:
    """Print the table; the exit status. Raises UserError."""
    say(collect([Path(run) for run in arguments.runs], Path(arguments.output_dir)))
    return 0


main = partial(run_command, "token-scaling", ScalingOptions, compare)
