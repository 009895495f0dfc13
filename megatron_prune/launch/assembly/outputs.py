"""What a run leaves in its folder besides checkpoints: config.yaml, summary.json, figures, run_status.json.

One rank writes. `run_status.json` is there only when the run ended by itself, and says how (see `write_run_status`).
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path

from megatron_prune.config import Config, dump
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.plots import plot_history
from megatron_prune.runtime.folders import probe_folder
from megatron_prune.training.state import RunState

logger = logging.getLogger(__name__)

RUN_STATUS = "run_status.json"


def check_places(config: Config) -> None:
    """Try to write where the run will write, before anything is built.

    Raises:
        UserError: a folder cannot be made or written (no permission, read-only, full, a file in the way).
    """
    places = {
        "checkpoint.save (--save)": config.checkpoint.save,
        "logging.tensorboard_dir (--tensorboard-dir)": config.logging.tensorboard_dir,
        "data.data_cache_path (--data-cache-path)": config.data.data_cache_path,
    }
    for field, place in places.items():
        if place is not None:
            probe_folder(place, field)


def write_config(config: Config, directory: Path) -> None:
    """The effective configuration, as config.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump(config))


def clear_run_status(directory: Path) -> None:
    """Remove what a run before left, so that a crash of this one is not taken for its end."""
    (directory / RUN_STATUS).unlink(missing_ok=True)


def write_run_status(directory: Path, status: str, iteration: int) -> None:
    """How the run ended, for launchers; replaced in one piece, so a reader never sees half of it.

    Args:
        status: `finished`; `preempted`, `time_limit`, `exit_interval`: stopped as asked, and --load goes on from
            `iteration`, which is saved; `stopped`: ended by an error of its own, see the log.
    """
    temporary = directory / f"{RUN_STATUS}.tmp"
    with temporary.open("w") as file:
        file.write(json.dumps({"status": status, "iteration": iteration}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / RUN_STATUS)


def write_summary(config: Config, state: RunState, architecture: Architecture, directory: Path) -> None:
    """summary.json (measured facts of each stage) and, where matplotlib is installed, the figures."""
    facts = {
        "iteration": state.iteration,
        "consumed_tokens": state.consumed_tokens,
        "target_params": config.pruning.target_params,
        "groups_removed": len(state.history),
        "skipped_iterations": state.skipped_iterations,
        "stages": state.stages,
    }
    (directory / "summary.json").write_text(json.dumps(facts, indent=2) + "\n")
    if not state.history:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("matplotlib is not installed: no figures")
        return
    for path in plot_history(state.history, architecture, directory):
        logger.info("figure written: %s", path)
