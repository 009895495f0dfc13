"""What a run leaves in its folder besides checkpoints: config.yaml, summary.json, figures, report.html.

One rank writes. How the run ended is `checkpoint.record.write_status`'s.
"""

import importlib.util
import json
import logging
from pathlib import Path

from megatron_prune.checkpoint.files import holds_checkpoint
from megatron_prune.config import Config, dump
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture
from megatron_prune.pruning.history_plot import plot_history
from megatron_prune.report.html_page import FILE_NAME, is_installed, write_page
from megatron_prune.runtime.folders import probe_folder, replace_file
from megatron_prune.training.sinks import check_wandb
from megatron_prune.training.state import RunState

logger = logging.getLogger(__name__)


def check_places(config: Config) -> None:
    """Try to write where the run will write, before anything is built. Raises UserError: a folder cannot be made or
    written (no permission, read-only, full, a file in the way), or what the run would report to is not installed."""
    check_wandb(config)
    for field, place in places(config).items():
        probe_folder(place, field)


def places(config: Config) -> dict[str, str]:
    """Field -> folder that the run writes into."""
    metrics = config.logging.prometheus_file
    given = {
        "checkpoint.save (--save)": config.checkpoint.save,
        "logging.tensorboard_dir (--tensorboard-dir)": config.logging.tensorboard_dir,
        "data.data_cache_path (--data-cache-path)": config.data.data_cache_path,
        "logging.prometheus_file (--prometheus-file)": metrics and str(Path(metrics).parent),
    }
    return {field: place for field, place in given.items() if place is not None}


def write_config(config: Config, directory: Path) -> None:
    """The effective configuration, as config.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / "config.yaml", dump(config).encode())


def write_summary(config: Config, state: RunState, architecture: Architecture, directory: Path) -> None:
    """summary.json (measured facts of each stage) and, where matplotlib is installed, the figures."""
    facts = {
        "iteration": state.iteration,
        "consumed_tokens": state.consumed_tokens,
        "target_params": config.pruning.target_params,
        **({"target": config.pruning.target.other_limits} if config.pruning.target.other_limits else {}),
        "groups_removed": len(state.history),
        "skipped_iterations": state.skipped_iterations,
        "stages": state.stages,
    }
    replace_file(directory / "summary.json", (json.dumps(facts, indent=2) + "\n").encode())
    if not state.history:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("matplotlib is not installed: no figures")
        return
    for path in plot_history(state.history, architecture, directory):
        logger.info("figure written: %s", path)


def write_report(config: Config, directory: Path) -> Path | None:
    """report.html, where it is wanted, plotly is installed and something is saved; a failure is a warning."""
    if not config.logging.report or not holds_checkpoint(directory):
        return None
    if not is_installed():
        logger.info("plotly is not installed (megatron-prune[report]): no %s", FILE_NAME)
        return None
    try:
        write_page([directory], directory / FILE_NAME)
    except (UserError, OSError) as error:
        logger.warning("%s could not be written: %s", FILE_NAME, error)
        return None
    logger.info("report written: %s", directory / FILE_NAME)
    return directory / FILE_NAME
