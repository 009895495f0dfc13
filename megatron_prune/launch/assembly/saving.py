"""The run's checkpoints: when one is written it is at once or in the background, and what happens when it cannot be."""

import os
from pathlib import Path
from typing import Any

from megatron_prune.checkpoint.files import CheckpointSaveError, Retention, iteration_of
from megatron_prune.checkpoint.save import AsyncSaver, save_checkpoint
from megatron_prune.config import Config, dump
from megatron_prune.errors import TrainingStoppedError
from megatron_prune.huggingface.trained_with import tokenizer_facts
from megatron_prune.launch.assembly.data_order import consumed, data_order
from megatron_prune.launch.assembly.opening import Inputs
from megatron_prune.resharding.live import LiveModel
from megatron_prune.training.metrics import Reporter
from megatron_prune.training.state import RunState


class CheckpointSaver:
    """Writes checkpoints of `model`, trained on the data set `train`, into `directory`; all ranks call it together.

    `shuffle` is `shuffle_of` the training set, where one reads on in it.

    A save that fails leaves older checkpoints as they are. With `checkpoint.on_save_error: continue` it is reported
    and training goes on to the next one; with `stop` the run ends.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        model: LiveModel,
        train: Any,
        directory: Path,
        reporter: Reporter,
        shuffle: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.directory, self.reporter = model, directory, reporter
        self.stops_on_error = config.checkpoint.on_save_error == "stop"
        self.goes_back = config.checkpoint.ckpt_step is not None  # told to give up what was saved after it
        self.retain = Retention(config.checkpoint.keep_last, config.checkpoint.save_retain_interval)
        self.background = AsyncSaver() if config.checkpoint.async_save else None
        teacher = inputs.teacher
        self.constants = {
            "config": dump(config),
            "tokenizer_model": os.path.abspath(inputs.tokenizer.path),
            "tokenizer_type": inputs.tokenizer.kind,
            **tokenizer_facts(inputs.tokenizer, (data.metadata for data in inputs.train.data)),
            "source": inputs.source_facts,
            "data_order": data_order(config, inputs.train),
            "data_shuffle": shuffle,
            "teacher": teacher and {"place": str(teacher.place.absolute()), "digest": teacher.digest},
        }
        self.blend, self.train = inputs.train, train
        self.complete = inputs.record.iteration if inputs.record and _is_in(inputs.record.path, directory) else None

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes in the background."""
        return self.background is not None and self.background.is_writing

    def save(self, state: RunState) -> None:
        """Save now; in the background, the one before is waited for and reported first. Raises TrainingStoppedError: it
        failed, and on_save_error is `stop`."""
        self.finish()
        samples = consumed(self.train, self.blend, state.consumed_samples)
        values = {**state.to_state(), **self.constants, "consumed_samples_per_data_set": samples}
        try:
            path = save_checkpoint(
                self.model,
                self.directory,
                state.iteration,
                values,
                retain=self.retain,
                saver=self.background,
                goes_back=self.goes_back,
            )
        except CheckpointSaveError as error:
            self._failed(error)
        else:
            self._succeeded(path)

    def finish(self) -> None:
        """Wait for a save in the background. Raises as `save` does."""
        if self.background is None:
            return
        try:
            path = self.background.finalize(blocking=True)
        except CheckpointSaveError as error:
            self._failed(error)
        else:
            self._succeeded(path)

    def _succeeded(self, path: Path | None) -> None:
        if path is not None:
            self.complete = iteration_of(path)
            self.reporter.message(f" saved checkpoint {path}")

    def _failed(self, error: CheckpointSaveError) -> None:
        safe = "there is no earlier one" if self.complete is None else f"iteration {self.complete} is safe"
        if self.stops_on_error:
            raise TrainingStoppedError(f"{error}; {safe}; checkpoint.on_save_error is stop, so the run ends") from error
        self.reporter.message(f" WARNING: {error}; {safe}, training goes on")


def _is_in(folder: Path, directory: Path) -> bool:
    return folder.parent.resolve() == directory.resolve()
