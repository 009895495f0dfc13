"""What a run's folder tells, read once: facts of it, and arrays with an entry per removal, per unit or per log line.

    Story        facts and arrays of one run (page.js draws them; the names are listed there as well)
    read_story   folder -> Story, of a finished run or of one that goes on

Read are the newest checkpoint's architecture, `pruning_history.jsonl`, TensorBoard's scalars, `config.yaml`,
`summary.json` and the evaluation; all but the first may be missing.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune import __version__
from megatron_prune.checkpoint.files import resolve, steps
from megatron_prune.checkpoint.record import CONFIG_FILE, read_brief, read_status
from megatron_prune.config import Config, read_file, yaml_value
from megatron_prune.config.options import all_options
from megatron_prune.data.hub_files import present, read_json
from megatron_prune.errors import UserError, first_line
from megatron_prune.model import first_format
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import Kind
from megatron_prune.pruning.groups import group_names
from megatron_prune.pruning.history import FILE_NAME, LARGEST, Removal, read_removals, widest
from megatron_prune.pruning.history_plot import positions
from megatron_prune.reading import is_there, read_words

LIVES, ABSENT = 0xFFFFFFFF, 0xFFFFFFFE  # instead of the removal a unit left with: it is there; it never was
_POINTS = 4000  # of a curve, at most about so many


@dataclass(frozen=True)
class Story:
    """One run.

    Args:
        facts: a JSON object.
        arrays: flat ones. An entry per removal: `x`, `iteration`, `group` (a number in facts["groups"]), `margin`,
            `parameters`, `score/GROUP`, `width/KIND`. Per unit, site after site: `left/KIND` (which removal took it).
            Per unit of a kind that others follow: `serves/KIND`. Per log line: `at/SCALAR` (tokens), `value/SCALAR`.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_story(folder: Path) -> Story:
    """All that is shown of the run in `folder`. Raises UserError: it is none, or a file of it cannot be read."""
    iteration, newest = resolve(folder)
    architecture = Architecture.from_json(_json(newest / "architecture.json"))
    config = read_file(folder / CONFIG_FILE) if present(folder / CONFIG_FILE) else None
    removals = _removals(folder / FILE_NAME)
    summary = _json(folder / "summary.json")
    try:
        left = _left(architecture, removals)
        start, now = (
            Architecture(architecture.shape, {k: tuple(map(np.flatnonzero, sites)) for k, sites in live.items()})
            for live in ({k: v != ABSENT for k, v in left.items()}, {k: v == LIVES for k, v in left.items()})
        )
        at, xlabel = positions(removals)
        facts = {
            "name": folder.resolve().name,
            "version": __version__,
            "status": read_status(folder) or "running, or cut off",
            "iteration": iteration,
            "source": config.model.hf_model and Path(config.model.hf_model).name if config else None,
            "target": config.pruning.target_params if config else None,
            "xlabel": xlabel,
            "groups": list(group_names()),
            "parameters": [a.parameters for a in (Architecture.full(architecture.shape), start, now)],
            "kv_cache": [a.kv_cache_channels for a in (start, now)],
            **_kinds(start, now),
            "stages": {name: first_format.stage(stage) for name, stage in (summary.get("stages") or {}).items()},
            "checkpoints": [read_brief(folder, step) for step in steps(folder)],
            "evaluation": _evaluation(_json(folder / "evaluation" / "evaluation.json")),
            "settings": [] if config is None else list(_settings(config)),
        }
        arrays = {**_of_removals(removals, at, architecture), **_serving(architecture)}
        arrays |= {f"left/{kind}": sites.reshape(-1) for kind, sites in left.items()}
        curves, facts["tokens"] = _curves(_board(folder, config), config, removals)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: not what a run writes ({type(error).__name__}: {first_line(error)})") from error
    return Story(facts, {**arrays, **curves})


# The history ----------------------------------------------------------------------------------------------------------


def _removals(path: Path) -> list[Removal]:
    """Lines so far; a last one that the run is about to write is left out."""
    try:
        text = read_words(path, LARGEST) if is_there(path) else ""
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    return read_removals(text[: text.rfind("\n") + 1].splitlines(), str(path), json.loads)


def _left(architecture: Architecture, removals: Sequence[Removal]) -> dict[Kind, np.ndarray]:
    """Per prunable kind uint32 [sites, units of the source]: which removal a unit left with, or LIVES, or ABSENT.

    `architecture` may be older than the last removals: a run goes on after its last checkpoint.
    """
    left = {}
    for kind in architecture.table.prunable:
        left[kind] = np.full((kind.sites(architecture.shape), kind.size(architecture.shape)), ABSENT, dtype=np.uint32)
        for row, ids in zip(left[kind], architecture.sites(kind), strict=True):
            row[ids] = LIVES
    for number, removal in enumerate(removals):
        for kind, sites in removal.group.gone.items():
            for row, units in zip(left[kind], sites, strict=True):
                row[list(units)] = number
    return left


def _of_removals(removals: Sequence[Removal], at: Sequence[int], a: Architecture) -> dict[str, np.ndarray]:
    def column(values: Iterator[Any], dtype: str = "f4") -> np.ndarray:
        return np.array([np.nan if value is None else value for value in values], dtype=dtype)

    groups = group_names()
    return {
        "x": np.array(at, dtype="f8"),
        "iteration": column((r.iteration for r in removals), "u4"),
        "group": column((groups.index(r.kind) for r in removals), "u1"),
        "parameters": column((r.parameters for r in removals), "f8"),
        "margin": column(r.margin for r in removals),
        **{f"score/{name}": column(r.scores.get(name) for r in removals) for name in groups},
        **{
            f"width/{kind}": column((widest(r.widths[kind.name]) for r in removals), "u4")
            for kind in a.table.prunable
            if all(kind.name in r.widths for r in removals)
        },
    }


def _kinds(start: Architecture, now: Architecture) -> dict[str, Any]:
    """`kinds` and `followers`: what each is called, how many there are in the source, at the start, now."""

    def told(kind: Kind) -> dict[str, Any]:
        return {
            "name": kind.name,
            "label": kind.label,
            "title": kind.title,
            "shared": kind.is_shared,
            "sites": kind.sites(start.shape),
            "size": kind.size(start.shape),
            "start": start.span(kind),
            "now": now.span(kind),
            "follows": kind.follows and kind.follows.name,
        }

    return {
        "kinds": [told(kind) for kind in start.table.prunable],
        "followers": [told(kind) for kind in start.table.varying if kind.follows is not None],
    }


def _serving(a: Architecture) -> dict[str, np.ndarray]:
    """For each unit of a followed kind, the unit that serves it."""
    followers = [kind for kind in a.table.varying if kind.follows is not None]
    return {
        f"serves/{kind.follows}": kind.serving(np.arange(kind.follows.size(a.shape)), a.shape).astype("u4")
        for kind in followers
        if kind.follows is not None
    }


# Scalars --------------------------------------------------------------------------------------------------------------


def _board(folder: Path, config: Config | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """TensorBoard's scalars: name -> (iterations, values)."""
    place = Path((config and config.logging.tensorboard_dir) or folder / "tensorboard")
    if not place.is_dir():
        return {}
    for file in place.iterdir():
        present(file) if "tfevents" in file.name else None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, **dict.fromkeys(("histograms", "tensors", "images", "audio", "compressedHistograms"), 1)}
    events = EventAccumulator(str(place), size_guidance=sizes).Reload()
    columns = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {
        tag: (np.array([e.step for e in column], "f8"), np.array([e.value for e in column], "f4"))
        for tag, column in columns.items()
    }


def _curves(
    board: dict[str, tuple[np.ndarray, np.ndarray]], config: Config | None, removals: Sequence[Removal]
) -> tuple[dict[str, np.ndarray], int]:
    """Arrays of every scalar over tokens, and how many tokens were consumed."""
    per_iteration = config.tokens_per_iteration if config else 1
    iterations, tokens = board.pop("consumed tokens", (np.zeros(0), np.zeros(0)))
    most = int(max([*tokens[-1:], *(removal.tokens for removal in removals[-1:])], default=0))
    arrays = dict[str, np.ndarray]()
    for tag, (at, values) in board.items():
        if tag.startswith("saliency/"):  # the history has them
            continue
        known = np.interp(at, [0, *iterations], [0, *tokens]) if len(iterations) else at * per_iteration
        kept = thin(values, _POINTS)
        arrays |= {f"at/{tag}": known[kept].astype("f8"), f"value/{tag}": values[kept]}
    return arrays, most


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """Which points to draw of a curve with many: of each of `most` / 2 stretches the lowest and the highest."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), most // 2 + 1).astype(int)
    finite = np.where(np.isfinite(values), values, 0)
    ends = [(a + finite[a:b].argmin(), a + finite[a:b].argmax()) for a, b in itertools.pairwise(edges)]
    return np.unique(np.array([0, *np.ravel(ends), len(values) - 1]))


# Small files ----------------------------------------------------------------------------------------------------------


def _settings(config: Config) -> Iterator[tuple[str, str, bool]]:
    """(name, value, whether it is the default's) of every option."""
    for option in all_options(Config):
        value = getattr(getattr(config, option.section), option.name)
        yield option.key, yaml_value(value), value == option.default


def _evaluation(found: dict[str, Any]) -> dict[str, Any] | None:
    """Models, and rows (data or task, measure, a number per model)."""
    models = found.get("models")
    if not models:
        return None
    rows = dict[tuple[str, str], list[float | None]]()

    def put(model: int, name: str, measure: str, value: float | None) -> None:
        rows.setdefault((name, measure), [None] * len(models))[model] = value

    for number, model in enumerate(models):
        for corpus in model["perplexity"]:
            put(number, corpus["data"], "perplexity per token", corpus["perplexity"])
        for task in model["tasks"]:
            put(number, task["task"], task["metric"], task["value"])
    table = [[*names, *values] for names, values in rows.items()]
    return {"models": [model["name"] for model in models], "rows": table}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if present(path) else {}
