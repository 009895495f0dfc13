"""The teacher of a run (section `distillation`): where it is read from, and that it fits.

TeacherInputs   what it is made of
teacher_place   its folder
open_teacher    configuration -> TeacherInputs, checked; None without distillation
check_same      a resumed run goes on with the same one
lesson          what trains the source first (`teacher_tokens`)
build_objective what a run minimises
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from megatron_prune.checkpoint.files import holds_checkpoint
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import Progress, RunRecord
from megatron_prune.config import Config, ContinuedConfig, DistillationConfig, PruningConfig
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.data.tokenizer_files import holds_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.weights import FolderWeights, source_view
from megatron_prune.launch.assembly.samples import fingerprints
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.llama import ModelOptions
from megatron_prune.model.teacher import Teacher
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.training.distillation import Distillation
from megatron_prune.training.step import NEXT_TOKEN, Objective

logger = logging.getLogger(__name__)

FIELD = "distillation.teacher (--distill-teacher)"
SOURCE = "source"


@dataclass(frozen=True)
class TeacherInputs:
    """A teacher that was opened.

    Args:
        place: its folder. files: what it is read from.
        read: Hugging Face name -> tensor in the shape that `architecture` was made from.
    """

    place: Path
    files: tuple[Path, ...]
    architecture: Architecture
    read: Callable[[str], Tensor]

    @cached_property
    def digest(self) -> str:
        """Hex digest of sizes and sampled content of its files, wherever they lie (see `samples`)."""
        return hashlib.sha256("\n".join(fingerprints(self.files).values()).encode()).hexdigest()[:16]


def teacher_place(config: Config) -> Path:
    """Its folder. Raises UserError if the source is meant and none is named."""
    name, taught = config.distillation.teacher, taught_place(config)
    if taught is not None and holds_checkpoint(taught):
        return taught
    if name == SOURCE and config.model.hf_model is None:
        raise UserError(f"{FIELD}: source means model.hf_model, which is not set; name the source with --hf-model")
    return Path(str(config.model.hf_model) if name == SOURCE else name)


def open_teacher(config: Config, student: Architecture, tokenizer: Tokenizer) -> TeacherInputs | None:
    """The teacher that `distillation.teacher` names. Raises UserError: there is none, or its vocabulary or tokenizer is
    not the run's."""
    if not config.distillation.weight:
        return None
    place = teacher_place(config)
    found = _of_checkpoint(place) if holds_checkpoint(place) else _of_folder(place)
    theirs, ours = found.architecture.shape.vocab_size, student.shape.vocab_size
    if theirs != ours:
        raise UserError(
            f"{FIELD}: {place} has a vocabulary of {theirs} ids and the model in training one of {ours}; their logits "
            "cannot be compared: give a teacher with the same tokenizer"
        )
    if config.distillation.teacher != SOURCE and holds_tokenizer(place):
        other = build_tokenizer(None, str(place))
        if other.kind == tokenizer.kind and other.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{FIELD}: {place} has another tokenizer ({other.fingerprint[:12]}) than the data "
                f"({tokenizer.fingerprint[:12]} of {tokenizer.path}); its logits mean other words"
            )
    return found


def check_same(teacher: TeacherInputs | None, record: RunRecord) -> None:
    """Raise UserError if the run of this checkpoint has learnt from another teacher."""
    known = record.state.get("teacher")
    if teacher is not None and known and known["digest"] != teacher.digest:
        raise UserError(
            f"{FIELD}: {teacher.place} (digest {teacher.digest}) is not the teacher that the checkpoint's run learns "
            f"from, {known['place']} ({known['digest']}); name that one, or begin a new run with --finetune"
        )


def lesson(config: Config) -> Config | None:
    """The run that makes the teacher out of the source, in SAVE/teacher, resumed where it is half done; None: there is
    nothing to train."""
    tokens, save = config.distillation.teacher_tokens, taught_place(config)
    if save is None:
        return None
    warmup = min(config.optimizer.lr_warmup_iters, -(-tokens // config.tokens_per_iteration) - 1)
    plain = replace(
        config,
        training=replace(config.training, train_iters=-(-tokens // config.tokens_per_iteration), exit_at_target=False),
        optimizer=replace(config.optimizer, lr_schedule="phases", lr_decay_iters=None, lr_warmup_iters=max(warmup, 0)),
        pruning=PruningConfig(),
        distillation=DistillationConfig(),
        continued=ContinuedConfig(),
        checkpoint=replace(config.checkpoint, save=str(save), load=str(save), ckpt_step=None, finetune=False),
    )
    return None if Progress.read(save).is_finished(plain) else plain


def taught_place(config: Config) -> Path | None:
    """Where a teacher that is trained first is kept; None: none is."""
    if not config.distillation.teacher_tokens or not config.distillation.weight:
        return None
    assert config.checkpoint.save is not None
    return Path(config.checkpoint.save) / "teacher"


def _of_folder(place: Path) -> TeacherInputs:
    architecture, weights = read_architecture(str(place)), FolderWeights(place)
    weights.check(architecture)
    files = {place / "config.json", *(stored.file for stored in weights.stored.values())}
    return TeacherInputs(place, tuple(sorted(files)), architecture, source_view(weights, architecture))


def _of_checkpoint(place: Path) -> TeacherInputs:
    reader = CheckpointReader(place)
    files = tuple(path for path in sorted(reader.path.iterdir()) if path.is_file())
    return TeacherInputs(reader.path, files, reader.architecture, reader.read)


def build_objective(
    config: Config, teacher: TeacherInputs | None, mesh: Mesh, options: ModelOptions, quanta: Quanta
) -> Objective:
    """Cross entropy, or what is learnt from the teacher beside it (a collective that reads the teacher's weights)."""
    if teacher is None:
        return NEXT_TOKEN
    layout = ShardLayout.pack(teacher.architecture, mesh.tp_size, quanta)
    plain = replace(options, recompute_granularity=None, recompute_method=None, recompute_num_layers=None)
    model, distillation = Teacher(layout, mesh, plain, teacher.read), config.distillation
    logger.info("teacher: %s, %d parameters, digest %s", teacher.place, teacher.architecture.parameters, teacher.digest)
    return Distillation(model, distillation.weight, distillation.temperature)
