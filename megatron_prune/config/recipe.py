"""Recipes: how a run pruned its model, in one file without weights, to be repeated on a source of the same shape.

The file is one JSON object, a key a line and a removal a line: `format`, `shape` (of the source), `history` (lines of a
pruning history), `settings` (section -> option -> value as YAML spells it), `result`, `data` and `source` for people,
`digest` (SHA-256 of all the rest).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.config.options import options_of, sections_of
from megatron_prune.config.pruning import Target
from megatron_prune.config.schema import Config
from megatron_prune.config.yaml_file import read_yaml, yaml_value
from megatron_prune.errors import UserError, first_line
from megatron_prune.reading import read_content

FORMAT = "megatron_prune recipe 1"
_SHARED = ("training", "optimizer", "pruning", "distillation", "continued")
# What belongs to one machine or one run of it, or is said by the history.
_OWN = {
    "training.exit_interval",
    "training.exit_duration_in_mins",
    "training.check_invariants",
    "distillation.teacher",
    *(f"pruning.{name}" for name in ("target_params", "schedule", "ratio", "first_prune_iter", "replay", "replay_end")),
}


def shared_settings(config: Config) -> dict[str, dict[str, str]]:
    """Section -> option -> value, of what is not the default's."""
    found: dict[str, dict[str, str]] = {
        "data": {"seq_length": str(config.data.seq_length)},
        "optimizer": {"lr_schedule": "whole_run" if config.is_one_schedule else "phases"},
    }
    for section in _SHARED:
        for option in options_of(sections_of(Config)[section], section):
            value = getattr(getattr(config, section), option.name)
            if value != option.default and option.key not in _OWN:
                found.setdefault(section, {}).setdefault(option.name, yaml_value(value))
    return found


def write_recipe(facts: Mapping[str, Any]) -> str:
    """The file's text; see above for what `facts` holds beside format and digest."""
    facts = {"format": FORMAT, **facts}
    lines = [f" {json.dumps(key)}: {_laid_out(value)}" for key, value in {**facts, "digest": _digest(facts)}.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _laid_out(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
    return json.dumps(value)


def _digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in facts.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The file's object. Raises UserError: it cannot be read, is no recipe, or was edited."""
    try:
        found = json.loads(read_content(path))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no recipe ({first_line(error)})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: no recipe; `megatron-prune recipe RUN` makes one of a run")
    if found.get("digest") != _digest(found):
        raise UserError(f"{path}: contradicts its digest; it was edited or damaged, ask for it again")
    wanted = {"settings": dict, "history": list, "shape": dict, "result": dict}
    for name, kind in wanted.items():
        if not isinstance(found.get(name), kind):
            raise UserError(f"{path}: {name}: expected {'a list' if kind is list else 'a table'}")
    return found


def recipe_config(path: str | Path) -> Config:
    """The settings of a recipe, with `pruning.replay` and the target that its history ends at. Raises UserError."""
    recipe = read_recipe(path)
    lines = []
    for section, values in recipe["settings"].items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: settings: {section}: expected a table")
        lines.append(f"{section}:")
        for name, value in values.items():
            key = f"{section}.{name}"
            if (section not in _SHARED and key != "data.seq_length") or key in _OWN:
                raise UserError(f"{path}: settings: {key} is not a recipe's to say")
            lines.append(f"  {name}: {' '.join(str(value).split())}")
    config = read_yaml("\n".join(lines), f"{path}: settings")
    target = recipe["result"].get("parameters")
    if type(target) is not int or target < 1:
        raise UserError(f"{path}: result: parameters: expected a whole number")
    pruning = dataclasses.replace(config.pruning, target_params=target, target=Target(), replay=str(path))
    return dataclasses.replace(config, pruning=pruning)
