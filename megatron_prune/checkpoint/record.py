"""A run as its folder tells it: where it goes on, how far and how long it is, what it was trained with, how it ended.

The only reader and writer of run state. Launchers import it, and read `Progress`, without torch or numpy.

    Progress       how far the newest checkpoint is; how long its run is, and whether it is finished
    RunRecord      all of a checkpoint except its tensors; `read` verifies it, no torch.distributed needed
    read_brief     a line about a checkpoint, for tables
    record_files   what `RunRecord.read` reads, as bytes
    STATE_FIELDS   the run's state, field by field
    write_status, read_status, clear_status    run_status.json: how the last process of the run ended

Which checkpoint is the one to go on from, after whatever crash, is `files.resolve`. In each `iter_...` folder, beside
megatron-core's own files (`.metadata`, `metadata.json`, `*.distcp`):

    architecture.json   widths and live units, for people and machines
    layout.json         which unit sat in which slot, empty slots included: the same layout resumes bit for bit
    run_state.json      facts needed to load, the scalars of the run's state
    config.yaml         the effective configuration, when the state has one
    common.pt           the whole of the run's state, and random generators per rank
    checksums.json      sizes and CRC-32 of all these

The run's state is any nesting of dicts, lists, tuples, numbers, strings, None, numpy arrays and tensors. Fields in
`STATE_FIELDS` are of the type given there wherever they are present, and none must be: converted weights have few, and
older versions fewer. Fields that are not known are kept and ignored. A change that this does not cover needs
another `FORMAT`.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune import __version__
from megatron_prune.checkpoint.fields import (
    COUNT,
    LIST,
    MEASURED,
    PLAIN_TABLE,
    TABLE,
    TABLES,
    TEXT,
    FieldType,
    check_fields,
    one_of,
    table_with,
)
from megatron_prune.checkpoint.files import (
    MANIFEST,
    damages,
    holds_checkpoint,
    read_manifest,
    refuse_damaged,
    resolve,
    step_folder,
)
from megatron_prune.errors import UserError, first_line
from megatron_prune.reading import read_content
from megatron_prune.runtime.folders import replace_file

if TYPE_CHECKING:
    from megatron_prune.config import Config
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.model.layout import Quanta, ShardLayout

FORMAT = 1
RUN_FILE, COMMON_FILE, CONFIG_FILE, STATUS_FILE = "run_state.json", "common.pt", "config.yaml", "run_status.json"
SMALL_FILES = ("architecture.json", "layout.json", RUN_FILE, COMMON_FILE, "metadata.json")
PRUNING, CONTINUED = "pruning", "continued"
FINISHED, STOPPED, PREEMPTED, TIME_LIMIT = "finished", "stopped", "preempted", "time_limit"


# How far, how long ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and by a configuration how far it has to go.

    Args:
        iteration: finished iterations; None: nothing is saved yet.
        phase: `pruning` until the target is reached (also plain training), then `continued`.
        phase_start: iteration after which the phase began.
    """

    iteration: int | None = None
    phase: str = PRUNING
    phase_start: int = 0

    @classmethod
    def read(cls, save: Path) -> Progress:
        """Of the newest complete checkpoint in `save`, the one that training would go on from, also where a crash
        struck between two renames. Reads two small files and no tensors. Raises UserError: there is something, and no
        checkpoint that can be read."""
        if not holds_checkpoint(save):
            return cls()
        iteration, folder = resolve(save)
        refuse_damaged(save, iteration, damages(folder, [RUN_FILE]))
        run = _run_file(folder, iteration)
        check_fields(run, {"state": TABLE}, folder / RUN_FILE, required=True)
        state = run["state"]
        check_fields(state, STATE_FIELDS, folder / RUN_FILE)
        return cls(iteration, state.get("phase") or PRUNING, state.get("phase_start") or 0)

    def end(self, config: Config) -> int:
        """The iteration that ends the run; while it prunes, the one that ends pruning if the target is not reached."""
        if self.phase == CONTINUED:
            return self.phase_start if config.training.exit_at_target else self.longest(config)
        return config.training.train_iters

    def longest(self, config: Config) -> int:
        """Iterations of the run if it reaches its target as late as it may and does not stop there."""
        if config.is_one_schedule:
            return config.training.train_iters
        if self.phase == CONTINUED:
            return self.phase_start + config.continue_iters
        return config.training.train_iters + (config.continue_iters if config.pruning.enabled else 0)

    def is_pruned(self, config: Config) -> bool:
        """Whether the pruning phase is over: the target reached, or its limit of iterations."""
        return self.phase == CONTINUED or self.is_finished(config)

    def is_finished(self, config: Config) -> bool:
        """Whether no training is left."""
        return self.iteration is not None and self.iteration >= self.end(config)


# Fields ---------------------------------------------------------------------------------------------------------------


_MEASURED = ("iteration", "tokens", "parameters", "validation_loss", "evaluation_tokens_per_second")
_STAGES = FieldType(
    f"tables in which {', '.join(_MEASURED)} are numbers, by stage",
    lambda value: (
        PLAIN_TABLE.fits(value)
        and all(map(TABLE.fits, value.values()))
        and all(MEASURED.fits(facts[name]) for facts in value.values() for name in _MEASURED if name in facts)
    ),
)
_TRIPLES = FieldType(
    "lists of three", lambda value: LIST.fits(value) and all(LIST.fits(v) and len(v) == 3 for v in value)
)
STATE_FIELDS = {
    # How far it is.
    "phase": one_of(PRUNING, CONTINUED),
    **dict.fromkeys(("phase_start", "tokens", "consumed_tokens", "consumed_samples"), COUNT),
    "consumed_samples_per_data_set": PLAIN_TABLE,
    # What it was trained with.
    **dict.fromkeys(("config", "tokenizer_model", "tokenizer_type", "tokenizer_fingerprint"), TEXT),
    "data_tokenizers": _TRIPLES,
    "source": PLAIN_TABLE,
    "data_order": PLAIN_TABLE,
    "teacher": table_with(place=TEXT, digest=TEXT),
    "data_shuffle": table_with(samples=COUNT, epochs=LIST, digest=TEXT),
    # What came of it.
    "history": TABLES,
    "stages": _STAGES,
}
"""Of the state in a checkpoint; whoever writes it may add others."""

LAYOUT_FIELDS = {"tp": COUNT, "quanta": TABLE}


# A checkpoint ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What the stored tensors are.

    Args:
        dtype: of the model weights, e.g. `float32`.
        optimizer: kinds of optimizer state stored, out of `exp_avg`, `exp_avg_sq`, `main`.
        adam_step: steps taken (bias correction).
        tensor, pipeline, data: sizes of the mesh that saved it.
    """

    dtype: str
    optimizer: tuple[str, ...]
    adam_step: int
    tensor: int
    pipeline: int
    data: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the mesh that saved it: (tensor, pipeline, data)."""
        return self.tensor, self.pipeline, self.data


_MOMENTS = ("exp_avg", "exp_avg_sq", "main")
_FACTS = {
    "dtype": one_of("float32", "float16", "bfloat16"),
    "optimizer": FieldType(
        f"kinds of state out of {', '.join(_MOMENTS)}",
        lambda value: isinstance(value, list) and all(kind in _MOMENTS for kind in value),
    ),
    **dict.fromkeys(("adam_step", "tensor", "pipeline", "data"), COUNT),
}


@dataclass(frozen=True)
class RunRecord:
    """All of a checkpoint except its tensors.

    Args:
        path: its folder.
        layout_state: slot map (see `ShardLayout.to_state`).
        state: what the run gave to `save_checkpoint`, checked by `STATE_FIELDS`.
        rng: per rank, states of the random generators.
    """

    iteration: int
    path: Path
    architecture: Architecture
    layout_state: dict[str, Any]
    state: dict[str, Any]
    facts: Facts
    rng: list[dict[str, Any]]

    @classmethod
    def read(cls, directory: str | Path, step: int | None = None) -> RunRecord:
        """Read and verify the small files of a checkpoint.

        Args:
            directory: the folder that was saved to, or one `iter_...` folder in it.
            step: iteration; None: the newest complete one.

        Raises:
            UserError: there is no such checkpoint, or one of these files is damaged; names the newest good one.
        """
        from megatron_prune.checkpoint.plain import unpack
        from megatron_prune.model.architecture import Architecture
        from megatron_prune.pruning.history import read_removals

        iteration, folder = resolve(Path(directory), step)
        refuse_damaged(folder.parent, iteration, damages(folder, SMALL_FILES))
        run, layout = _run_file(folder, iteration), _load_json(folder / "layout.json")
        check_fields(run, _FACTS, folder / RUN_FILE, required=True)
        check_fields(layout, LAYOUT_FIELDS, folder / "layout.json", required=True)
        common = unpack(folder / COMMON_FILE)
        if not isinstance(common, dict):
            raise UserError(f"{folder / COMMON_FILE}: holds no state of a run")
        check_fields(common, {"state": TABLE, "rng": LIST}, folder / COMMON_FILE, required=True)
        check_fields(common["state"], STATE_FIELDS, folder / COMMON_FILE)
        read_removals(common["state"].get("history") or [], f"{folder / COMMON_FILE}: history")
        return cls(
            iteration=iteration,
            path=folder,
            architecture=Architecture.from_json(_load_json(folder / "architecture.json")),
            layout_state=layout,
            state=common["state"],
            facts=Facts(**{name: run[name] for name in _FACTS} | {"optimizer": tuple(run["optimizer"])}),
            rng=common["rng"],
        )

    @property
    def is_run(self) -> bool:
        """Whether it is of a run that can go on, not just weights to start from."""
        return "phase" in self.state

    @property
    def history(self) -> list[dict[str, Any]]:
        """All removals, in order (`Removal.to_json`)."""
        return self.state.get("history") or []

    @property
    def stored_bytes(self) -> int:
        """Size of the whole checkpoint."""
        return sum(d.size for d in read_manifest(self.path).values()) + (self.path / MANIFEST).stat().st_size

    @property
    def saved_layout(self) -> ShardLayout:
        """The layout that was saved, empty slots included."""
        from megatron_prune.model.layout import ShardLayout

        return ShardLayout.from_state(self.architecture, self.layout_state)

    def layout(self, tp: int, quanta: Quanta) -> ShardLayout:
        """The layout to build the model with: the saved slots when TP and quanta are the same, else packed anew."""
        from megatron_prune.model.layout import ShardLayout, named_quanta

        if tp == self.layout_state["tp"] and named_quanta(self.architecture, tp, quanta) == self.layout_state["quanta"]:
            return self.saved_layout
        return ShardLayout.pack(self.architecture, tp, quanta)


def record_files(
    iteration: int, layout: ShardLayout, facts: Facts, state: dict[str, Any], rng: list[dict[str, Any]]
) -> dict[str, bytes]:
    """File name -> content, a snapshot of everything given. Raises TypeError: `state` holds something that is not
    plain; names where."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig

    from megatron_prune.checkpoint.plain import pack

    run = {
        "format": FORMAT,
        "iteration": iteration,
        **dataclasses.asdict(facts),
        "written_by": f"megatron_prune {__version__}",
        "state": {k: v for k, v in state.items() if k != "config" and isinstance(v, (bool, int, float, str))},
    }
    files = {
        "architecture.json": _json(layout.architecture.to_json()),
        "layout.json": json.dumps(layout.to_state()).encode(),
        RUN_FILE: _json(run),
        COMMON_FILE: pack({"state": state, "rng": rng}),
        "metadata.json": _json(dataclasses.asdict(CheckpointingConfig("torch_dist"))),
    }
    if isinstance(state.get("config"), str):
        files[CONFIG_FILE] = state["config"].encode()
    return files


def read_brief(save: Path, iteration: int) -> dict[str, Any]:
    """A line about one checkpoint of a run: its iteration, tokens, parameters, bytes, dtype and mesh, or its `damage`;
    no tensors are read."""
    folder = step_folder(save, iteration)
    try:
        run, shape = _run_file(folder, iteration), _load_json(folder / "architecture.json")
        check_fields(run, {**_FACTS, "state": TABLE}, folder / RUN_FILE, required=True)
        size = sum(digest.size for digest in read_manifest(folder).values())
    except (OSError, ValueError) as error:
        return {"iteration": iteration, "damage": first_line(error)}
    return {
        "iteration": iteration,
        "tokens": run["state"].get("consumed_tokens"),
        "parameters": shape.get("parameters"),
        "bytes": size,
        "dtype": run["dtype"],
        "mesh": [run[name] for name in ("tensor", "pipeline", "data")],
    }


def _run_file(folder: Path, iteration: int) -> dict[str, Any]:
    """run_state.json, if it is of this version and `iteration`. Raises UserError."""
    run = _load_json(folder / RUN_FILE)
    if run.get("format") != FORMAT:
        raise UserError(f"{folder / RUN_FILE}: format {reprlib.repr(run.get('format'))}, this version reads {FORMAT}")
    if run.get("iteration") != iteration:
        raise UserError(
            f"{folder}: holds the checkpoint of iteration {reprlib.repr(run.get('iteration'))}; folders of checkpoints "
            "keep their names: rename it back"
        )
    return run


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _load_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_content(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no JSON object")
    return found


# How it ended ---------------------------------------------------------------------------------------------------------


def write_status(save: Path, status: str, iteration: int) -> None:
    """How the run ended, for launchers; replaced in one piece, so a reader never sees half of it.

    Args:
        status: `finished`; `preempted`, `time_limit`, `exit_interval`: stopped as asked, and --load goes on from
            `iteration`, which is saved; `stopped`: ended by an error of its own, see the log.
    """
    replace_file(save / STATUS_FILE, _json({"status": status, "iteration": iteration}))


def read_status(save: Path) -> str | None:
    """The status that the training process left behind, or None."""
    try:
        return str(json.loads(read_content(save / STATUS_FILE))["status"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def clear_status(save: Path) -> None:
    """Remove what a run before left, so that a crash of this one is not taken for its end."""
    (save / STATUS_FILE).unlink(missing_ok=True)
