"""How a run pruned its model, as one file to share: shape, removals, settings, what data it saw. No weights.

    megatron-prune recipe runs/smollm_360m_to_134m --output recipe.json
    megatron-prune pretrain --recipe recipe.json --hf-model SmolLM-360M --data-path data/corpus --save runs/again

The second command repeats it on one's own source of that shape: the same groups leave at the same tokens, under the
same learning rates; flags and a --config win over the recipe. Places (paths, names of machines) are not in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.commands.running import check_file, run_command, say
from megatron_prune.config import read_yaml
from megatron_prune.config.options import option
from megatron_prune.config.recipe import read_recipe, shared_settings, write_recipe
from megatron_prune.data.indexed import read_metadata
from megatron_prune.errors import UserError
from megatron_prune.runtime.folders import replace_file


@dataclass(frozen=True)
class RecipeOptions:
    """The command's options."""

    load: str = option(None, "folder that the run saved to", metavar="DIR", required=True)
    output: str = option("recipe.json", "the file", metavar="FILE")


def recipe_of(record: RunRecord) -> dict[str, Any]:
    """What `write_recipe` wants of a run, as its newest checkpoint tells it. Raises UserError: nothing was pruned."""
    from megatron_prune.huggingface.provenance import source_of  # imports torch

    a, state = record.architecture, record.state
    if not record.history:
        raise UserError(f"{record.path}: nothing was pruned in this run, so there is nothing to repeat")
    if not isinstance(state.get("config"), str):
        raise UserError(f"{record.path}: has no configuration; a recipe is made of a run")
    config = read_yaml(state["config"], str(record.path / "config.yaml"))
    source = source_of(state)
    return {
        "source": {"name": source.get("name"), **(source.get("card") or {})},
        "shape": a.shape.to_json(),
        "result": {"parameters": a.parameters, "widths": a.widths(), "stages": state.get("stages") or {}},
        "settings": shared_settings(config),
        "data": {
            "consumed_tokens": state.get("consumed_tokens"),
            "tokenizer_fingerprint": state.get("tokenizer_fingerprint"),
            "sets": list(_data(state)),
        },
        "history": record.history,
    }


def _data(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A data set a line: its name, how many samples were seen, what its own file says."""
    for prefix, samples in (state.get("consumed_samples_per_data_set") or {}).items():
        made = read_metadata(prefix) if Path(f"{prefix}.json").is_file() else None
        size = {"documents": made.documents, "tokens": made.tokens} if made else {}
        yield {"name": Path(prefix).name, "samples": samples, **size}


def share(options: RecipeOptions) -> int:
    """Write the recipe and say so. Raises UserError."""
    check_file("--output", options.output)
    path, record = Path(options.output), RunRecord.read(options.load)
    replace_file(path, write_recipe(recipe_of(record)).encode())
    digest = read_recipe(path)["digest"]
    say(f"{path}: {len(record.history):,} removals to {record.architecture.parameters:,} parameters, digest {digest}")
    return 0


main = partial(run_command, "recipe", RecipeOptions, share, first="--load")
