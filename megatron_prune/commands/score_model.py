"""Score a checkpoint or a Hugging Face folder on data, once, by any criteria: what to look at before a run.

    megatron-prune score --hf-model DIR | --load DIR --data-path P [--criterion NAME ...] [--batches N]
        [--plot FILE.png] [--json FILE]
    torchrun --nproc-per-node 8 -m megatron_prune score --config run.yaml --tensor-model-parallel-size 8 ...

Prints, for each criterion and layer, the least, median and greatest score and each head's, then the stem's, and which
group would go first. Scores are what the first pruning step of a run with the same flags would see before smoothing.
Besides the flags below it takes those of pretrain (its --help lists them): layout, batch, data, --prune-fisher,
--prune-gqa and so on, also as --config FILE.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_prune.commands.running import check_file, check_plot, run_on_ranks
from megatron_prune.config import Config, Given, configured
from megatron_prune.config.options import option, sections_of
from megatron_prune.runtime.folders import replace_file

ALL = "all"


LISTED = 128  # up to so many units of a layer are listed one by one


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
    """Try to write where --json and --plot will, before anything is computed. Raises UserError."""
    if arguments.plot is not None:
        check_plot("--plot", arguments.plot)
    if arguments.json is not None:
        check_file("--json", arguments.json)


def table(name: str, scores: Any, per_column: bool) -> Iterator[str]:
    """Lines for one criterion: a layer each, then the stem."""
    a = scores.architecture
    if not any(values.any() for sites in scores.values.values() for values in sites):
        yield f"{name}: no unit has a score" + (", groups are drawn" if name == "random" else "")
        return
    own = [kind for kind in scores.values if not kind.is_shared]
    divisors = {kind: a.table.columns(kind) if per_column else 1 for kind in own}
    yield f"{name}: sums of S per unit" + (", divided by the columns it owns" if max(divisors.values()) > 1 else "")
    few = [kind for kind in own if kind.size(a.shape) <= LISTED]
    spread = f"{'least':>10} {'median':>10} {'greatest':>10}"
    yield " | ".join([f"{'':5}", *(f"{kind.title:^32}" for kind in own), *(f"{kind}:score" for kind in few)])
    yield " | ".join([f"{'layer':>5}", *(spread for _ in own)])
    for layer in a.layers:
        values = {kind: scores.of(kind, layer) / divisors[kind] for kind in own}
        listed = [_listed(a, kind, layer, values[kind]) for kind in few]
        yield " | ".join([f"{layer:>5}", *(_spread(values[kind]) for kind in own), *listed])
    for kind in (kind for kind in scores.values if kind.is_shared):
        values, ids = scores.of(kind), a.ids(kind, 0)
        least = " ".join(f"{ids[i]}:{values[i]:.2e}" for i in np.argsort(values, kind="stable")[:8])
        yield f"{kind.name:>5} | {_spread(values)} | of {len(values)}; least: {least}"


def _spread(values: np.ndarray) -> str:
    return f"{values.min():10.3e} {np.median(values):10.3e} {values.max():10.3e}"


def _listed(architecture: Any, kind: Any, layer: int, values: np.ndarray) -> str:
    """`id:score` of each unit; those that one unit of a following kind serves (a KV head) stand together."""
    words = [f"{unit}:{value:.2e}" for unit, value in zip(architecture.ids(kind, layer), values, strict=True)]
    follower = next((other for other in architecture.table.kinds if other.follows == kind), None)
    sizes = [1] * len(words) if follower is None else architecture.clusters(follower)[layer].tolist()
    if max(sizes) == 1:
        return " ".join(words)
    ends = np.cumsum(sizes)
    return " / ".join(" ".join(words[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def first(choice: Any) -> Iterator[str]:
    """A line: which group would leave first, and by which score and margin."""
    if choice is None:
        yield "first to go: nothing, every kind is at its floor"
        return
    saliencies = ", ".join(f"{kind} {score:.3e}" for kind, score in sorted(choice.scores.items(), key=lambda i: i[1]))
    sites = [site for sites in choice.group.gone.values() for site in sites]
    units = "; ".join(" ".join(map(str, site)) for site in sites)
    yield f"first to go: {choice.group.name} {units} (least saliency by kind: {saliencies}; margin {choice.margin:.1%})"


def write(arguments: ScoreOptions, scores: Mapping[str, Any], choices: Mapping[str, Any], per_column: bool) -> None:
    """Write the files that --json and --plot name."""
    a = next(iter(scores.values())).architecture
    if arguments.json is not None:
        found = {
            name: {
                **{kind.name: _json_scores(kind, sites) for kind, sites in units.values.items()},
                "first": _json_choice(choices[name]),
            }
            for name, units in scores.items()
        }
        # Sums; what a unit's is divided by where groups are compared, as the table and the figure show it.
        content = {
            "architecture": a.to_json(),
            "divisors": {kind.name: a.table.columns(kind) if per_column else 1 for kind in a.table.scored},
            "criteria": found,
        }
        replace_file(Path(arguments.json), (json.dumps(content) + "\n").encode())
        print(f"\nscores written: {arguments.json}")
    if arguments.plot is not None:
        from megatron_prune.saliency.plots import plot_scores

        title = f"{a.parameters:,} parameters, {a.shape.num_layers} layers"
        plot_scores(scores, Path(arguments.plot), title, per_column=per_column)
        print(f"figure written: {arguments.plot}")


def _json_scores(kind: Any, sites: Sequence[np.ndarray]) -> list[Any]:
    """[layers, units], or [units] of a kind that all layers share."""
    layers = [values.tolist() for values in sites]
    return layers[0] if kind.is_shared else layers


def _json_choice(choice: Any) -> dict[str, Any] | None:
    if choice is None:
        return None
    margin = choice.margin if np.isfinite(choice.margin) else None
    gone = {kind.name: sites for kind, sites in choice.group.gone.items()}
    return {"group": choice.group.name, "gone": gone, "scores": choice.scores, "margin": margin}


main = partial(run_on_ranks, "score", ScoreOptions, score, sections=sections_of(Config))
