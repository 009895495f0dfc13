"""What a run leaves in its folder besides checkpoints: config.yaml, summary.json, figures. One rank writes."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

from megatron_prune.config import Config, dump
from megatron_prune.pruning.plots import plot_history
from megatron_prune.training.state import RunState

logger = logging.getLogger(__name__)


def write_config(config: Config, directory: Path) -> None:
    """The effective configuration, as config.yaml."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump(config))


def write_summary(config: Config, state: RunState, directory: Path) -> None:
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
    for path in plot_history(state.history, directory):
        logger.info("figure written: %s", path)
