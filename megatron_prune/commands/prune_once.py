"""Prune a trained model to a target without training it: post-training pruning by any criterion, as a baseline.

    megatron-prune prune-once --hf-model DIR | --load DIR --data-path P --prune-target-params 130K --save DIR
        [--prune-metric NAME] [--rescore-every K] [--batches N]

Scores once on a calibration batch (or again after every K removals) and removes the least group by group, with the
scorer, selector and compaction of a training run, until parameters <= target. The result is a checkpoint at iteration 0
with the history of what was removed: convert_to_hf exports it, `pretrain --load` trains it on. The validation loss
before and after is measured where --split or --valid-data-path leaves data for it.

Besides the flags below it takes those of pretrain (its --help lists them): layout, batch, data, --prune-gqa and so on,
also as --config FILE. Works under torchrun as well. After a mistake nothing is written.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from megatron_prune.commands.running import run_on_ranks
from megatron_prune.config import Config, Given, configured
from megatron_prune.config.options import option, sections_of


@dataclass(frozen=True)
class PruneOnceOptions:
    """The command's own options, beside those of a run."""

    config: str | None = option(None, "YAML file of a run", metavar="FILE")
    batches: int | None = option(None, "micro-batches to score on; the run's global batch unless given")
    rescore_every: int | None = option(None, "score again after K removals; once unless given", metavar="K")


def prune(given: Given) -> int:
    """Prune and save; the exit status. Raises UserError."""
    arguments: PruneOnceOptions = given.own()
    run_config = configured(given, arguments.config)
    from megatron_prune.launch.assembly.one_shot_run import (
        check_count,
        check_pruning,
        one_shot_config,
        opened,
        prune_and_save,
    )
    from megatron_prune.runtime.join import own_place

    place = own_place()
    world_size, is_first = place.world_size, place.rank == 0
    check_count("--rescore-every", arguments.rescore_every)
    config = check_pruning(one_shot_config(run_config, arguments.batches), world_size)
    with opened(config) as run, tqdm(disable=not (is_first and sys.stderr.isatty()), unit=" parameters") as bar:
        source = run.inputs.architecture
        target = config.pruning.target_params
        bar.reset(total=None if target is None else max(source.parameters - target, 0))

        def on_removal(now: Any) -> None:
            gone = source.parameters - now.parameters
            bar.update((gone if bar.total is None else min(gone, bar.total)) - bar.n)

        result = prune_and_save(config, run, on_removal, arguments.rescore_every)
    if is_first:
        print("\n".join(lines(config, source, result)))
    return 0


def lines(config: Any, source: Any, result: Any) -> Iterator[str]:
    """What was done, as text."""
    final, counts = result.architecture, Counter(removal.kind for removal in result.removed)
    yield (
        f"{config.pruning.metric}, {config.training.global_batch_size} sequences of {config.data.seq_length} tokens, "
        f"scored {result.scorings} time{'s' if result.scorings > 1 else ''}: removed {len(result.removed)} groups ("
        + ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
        + ")"
    )
    kinds = source.table.prunable
    titles = " ".join(f"{kind.label:>6}" for kind in kinds)
    yield f"{'':8} {'parameters':>14} {titles} {'validation loss':>16}"
    for name, a, stage in (("before", source, "source"), ("after", final, "pruned")):
        loss = result.state.stages.get(stage, {}).get("validation_loss")
        shown = "not measured" if loss is None else f"{loss:.4f}"
        widths = " ".join(f"{a.span(kind):>6}" for kind in kinds)
        yield f"{name:8} {a.parameters:>14,} {widths} {shown:>16}"
    yield f"saved: {result.path}"


main = partial(run_on_ranks, "prune-once", PruneOnceOptions, prune, sections=sections_of(Config))
