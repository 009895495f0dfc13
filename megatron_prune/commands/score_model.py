"""Score a checkpoint or a Hugging Face folder on data, once, by any criteria: what to look at before a run.

    megatron-prune score --hf-model DIR | --load DIR --data-path P [--criterion NAME ...] [--batches N]
        [--plot FILE.png] [--json FILE]
    torchrun --nproc-per-node 8 -m megatron_prune score --config run.yaml --tensor-model-parallel-size 8 ...

Prints, for each criterion and layer, the least, median and greatest score and each head's, then the stem's, and which
group would go first. Scores are what the first pruning step of a run with the same flags would see before smoothing.
Besides the flags below it takes those of pretrain (its --help lists them): layout, batch, data, --prune-fisher,
--prune-gqa and so on, also as --config FILE.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_prune.commands.running import run_on_ranks
from megatron_prune.config import Config, Given, configured
from megatron_prune.config.options import option, sections_of

ALL = "all"


@dataclass(frozen=True)
class ScoreOptions:
    """The command's own options, beside those of a run."""

    config: str | None = option(None, "YAML file of a run", metavar="FILE")
    criterion: tuple[str, ...] = option(
        (), f"criteria to score by, or {ALL}; --prune-metric unless given", metavar="NAME"
    )
    batches: int | None = option(None, "micro-batches to score on; the run's global batch unless given")
    plot: str | None = option(None, "draw heat maps and curves into FILE (png, svg, pdf)", metavar="FILE")
    json: str | None = option(None, "write all scores with the units' original numbers into FILE", metavar="FILE")


def score(given: Given) -> int:
    """Score, print, write; the exit status. Raises UserError."""
    arguments: ScoreOptions = given.own()
    run_config = configured(given, arguments.config)
    from megatron_prune.config import validate
    from megatron_prune.launch.assembly.one_shot_run import one_shot_config, opened
    from megatron_prune.runtime.join import own_place
    from megatron_prune.training.one_shot import OneShot

    place = own_place()
    world_size, is_first = place.world_size, place.rank == 0
    config = one_shot_config(run_config, arguments.batches)
    names = criteria(arguments.criterion or (config.pruning.metric,))
    check_outputs(arguments)
    validate(config, world_size)
    scores, choices = {}, {}
    with opened(config, writes=False) as run, tqdm(unit="batch", disable=not (is_first and sys.stderr.isatty())) as bar:
        one_shot = OneShot(config, run.model, run.datasets.train, on_batch=bar.update)
        bar.reset(total=len(names) * one_shot.num_microbatches)
        for name in names:
            bar.set_description(name)
            scores[name] = one_shot.unit_scores(name)
            choices[name] = one_shot.first_choice(scores[name], name)
    if is_first:
        training, columns = config.training, config.pruning.head_score == "per_column"
        print(f"scored on {training.global_batch_size} sequences of {config.data.seq_length} tokens")
        for name in names:
            print("\n" + "\n".join([*table(name, scores[name], columns), *first(choices[name])]))
        write(arguments, scores, choices, columns)
    return 0


def criteria(names: Sequence[str]) -> list[str]:
    """The registered criteria asked for, each once. Raises UserError naming the known ones."""
    from megatron_prune.errors import UserError
    from megatron_prune.saliency.criteria import find_criterion, known_criteria

    if ALL in names:
        return known_criteria()
    try:
        return list(dict.fromkeys(find_criterion(name).name for name in names))
    except UserError as error:
        raise UserError(str(error).replace("pruning.metric", "--criterion", 1)) from None


def check_outputs(arguments: ScoreOptions) -> None:
    """What will be written must be possible, before anything is computed. Raises UserError."""
    from megatron_prune.errors import UserError

    for flag, value in (("--plot", arguments.plot), ("--json", arguments.json)):
        if value is None:
            continue
        path = Path(value)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{flag} {value}: cannot be written; name a file in a folder that exists")
    if arguments.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot: matplotlib is not installed; pip install 'megatron_prune[plot]'")
        if Path(arguments.plot).suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--plot {arguments.plot}: name a file that ends in .png, .svg or .pdf")


def table(name: str, scores: Any, per_column: bool) -> Iterator[str]:
    """Lines for one criterion: a layer each, then the stem."""
    a = scores.architecture
    if not (scores.ffn.any() or scores.head.any()):
        yield f"{name}: no unit has a score" + (", groups are drawn" if name == "random" else "")
        return
    heads = scores.head / a.shape.kv_channels if per_column else scores.head
    yield f"{name}: sums of S per unit" + (", a head's divided by its columns" if per_column else "")
    spread = f"{'least':>10} {'median':>10} {'greatest':>10}"
    yield f"{'':5} | {'FFN channels':^32} | {'query heads':^32} | head:score, KV heads apart"
    yield f"{'layer':>5} | {spread} | {spread} |"
    for layer, (ffn, head) in enumerate(zip(scores.ffn, heads, strict=True)):
        listed = _heads(a.heads[layer], head, a.shape.heads_per_group)
        yield f"{layer:>5} | {_spread(ffn)} | {_spread(head)} | {listed}"
    order = np.argsort(scores.stem, kind="stable")[:8]
    yield f" stem | {_spread(scores.stem)} | of {len(scores.stem)}; least: " + " ".join(
        f"{a.stem[i]}:{scores.stem[i]:.2e}" for i in order
    )


def _spread(values: np.ndarray) -> str:
    return f"{values.min():10.3e} {np.median(values):10.3e} {values.max():10.3e}"


def _heads(ids: np.ndarray, values: np.ndarray, per_group: int) -> str:
    """`id:score` of each head; heads that share a KV head stand together."""
    words = [f"{unit}:{value:.2e}" for unit, value in zip(ids, values, strict=True)]
    if per_group == 1:
        return " ".join(words)
    return " / ".join(
        " ".join(word for word, unit in zip(words, ids, strict=True) if unit // per_group == kv)
        for kv in np.unique(ids // per_group)
    )


def first(choice: Any) -> Iterator[str]:
    """Which group would go first, and by what."""
    if choice is None:
        yield "first to go: nothing, every kind is at its floor"
        return
    saliencies = ", ".join(f"{kind} {score:.3e}" for kind, score in sorted(choice.scores.items(), key=lambda i: i[1]))
    units = "; ".join(" ".join(map(str, layer)) for layer in choice.group.units)
    yield f"first to go: {choice.group.kind} {units} (least saliency by kind: {saliencies}; margin {choice.margin:.1%})"


def write(arguments: ScoreOptions, scores: Mapping[str, Any], choices: Mapping[str, Any], per_column: bool) -> None:
    """--json and --plot."""
    a = next(iter(scores.values())).architecture
    if arguments.json is not None:
        found = {
            name: {
                "head": units.head.tolist(),
                "ffn": units.ffn.tolist(),
                "stem": units.stem.tolist(),
                "first": _json_choice(choices[name]),
            }
            for name, units in scores.items()
        }
        # Sums; what a head's is divided by where groups are compared, as the table and the figure show it.
        content = {
            "architecture": a.to_json(),
            "head_divisor": a.shape.kv_channels if per_column else 1,
            "criteria": found,
        }
        Path(arguments.json).write_text(json.dumps(content) + "\n")
        print(f"\nscores written: {arguments.json}")
    if arguments.plot is not None:
        from megatron_prune.saliency.plots import plot_scores

        title = f"{a.parameters:,} parameters, {a.shape.num_layers} layers"
        plot_scores(scores, Path(arguments.plot), title, per_column=per_column)
        print(f"figure written: {arguments.plot}")


def _json_choice(choice: Any) -> dict[str, Any] | None:
    if choice is None:
        return None
    margin = choice.margin if np.isfinite(choice.margin) else None
    return {"kind": choice.group.kind, "units": choice.group.units, "scores": choice.scores, "margin": margin}


def main(argv: Sequence[str] | None = None) -> int:
    """Run on this rank; returns the exit status."""
    return run_on_ranks("score", ScoreOptions, score, argv, sections_of(Config))
