"""Everything a run reads, opened and checked before anything is built or written. No communication here.

Inputs            where weights come from, the architecture to start with, tokenizer and data
open_inputs       Config -> Inputs; raises UserError for whatever does not fit
tokenizer_place   where the tokenizer is read from
reads_on          whether a checkpoint's data are read on
check_context, check_target, check_output   single checks, also of a dry run
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_prune.checkpoint.files import holds_checkpoint, refuse_step
from megatron_prune.checkpoint.record import CONFIG_FILE, RunRecord
from megatron_prune.config import Config, PruningConfig, check_head_score, read_file, yaml_value
from megatron_prune.data.datasets import Blend, check_vocabulary, parse_blend
from megatron_prune.data.hub_files import read_json
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.errors import UserError, one_line
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.provenance import source_of, tokenizer_of
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.huggingface.weights import FolderWeights, source_view
from megatron_prune.launch.assembly.data_order import check_order
from megatron_prune.launch.assembly.teaching import TeacherInputs, check_same, open_teacher
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.classes import HYBRID, engine_of
from megatron_prune.model.kinds import LAYER
from megatron_prune.model.sources import RandomWeights
from megatron_prune.pruning.budget import Budget
from megatron_prune.pruning.groups import find_group
from megatron_prune.pruning.selector import least_architecture
from megatron_prune.saliency.criteria import find_criterion
from megatron_prune.training.pruning_settings import recorded, selector_rules

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a run starts from.

    Args:
        architecture: live units at the start.
        record: the checkpoint to load, or None.
        read: Hugging Face name -> source tensor, or None with a checkpoint.
        resumes: whether this run is that checkpoint's and goes on, rather than taking its weights to start from.
        source_facts: what the source's `config.json` says beyond the shape (special ids), for exports.
        shuffle: how the checkpoint's data were shuffled (`data_order.shuffle_of`), where this run reads on in them.
        teacher: what is distilled from, or None.
    """

    architecture: Architecture
    record: RunRecord | None
    resumes: bool
    read: Callable[[str], Tensor] | None
    tokenizer: Tokenizer
    train: Blend
    valid: Blend | None
    source_facts: dict[str, Any]
    shuffle: dict[str, Any] | None
    teacher: TeacherInputs | None = None


def open_inputs(config: Config, writes: bool = True) -> Inputs:
    """Open and check source, tokenizer, data and, if this run `writes`, its output folder. Raises UserError: missing or
    damaged files, vocabularies that disagree, other data than the checkpoint's, a target that cannot be reached, an
    output folder that already holds a run."""
    record = _record(config)
    read: Callable[[str], Tensor] | None = None
    if record is not None:
        architecture, facts = record.architecture, source_of(record.state)
    else:
        assert config.model.hf_model is not None
        whole, facts = read_architecture(config.model.hf_model), read_source(config.model.hf_model)
        architecture = first_architecture(config, whole)
        if config.model.init == "random":
            read = RandomWeights(whole.shape, config.training.seed)
        else:
            weights = FolderWeights(config.model.hf_model)
            weights.check(whole)
            read = source_view(weights, whole)
    tokenizer = build_tokenizer(*tokenizer_place(config, record))
    vocab_size = architecture.shape.vocab_size
    assert config.data.data_path is not None
    train = parse_blend(config.data.data_path, vocab_size)
    shuffle = None
    if record is not None and reads_on(config, record) and check_order(config, train, record.state.get("data_order")):
        shuffle = record.state.get("data_shuffle")
    valid = None
    if config.data.valid_data_path:
        valid = parse_blend(config.data.valid_data_path, vocab_size, "data.valid_data_path (--valid-data-path)")
    for blend in filter(None, (train, valid)):
        check_vocabulary(tokenizer, blend, vocab_size)
    check_context(config, architecture)
    check_target(config, architecture)
    if record is None:
        recorded(config, architecture)
    resumes = record is not None and _resumes(config, record)
    teacher = open_teacher(config, architecture, tokenizer)
    if record is not None and resumes:
        _tell_changes(config, record)
        check_same(teacher, record)
    else:
        check_head_score(config)
    if writes:
        check_output(config)
    return Inputs(architecture, record, resumes, read, tokenizer, train, valid, facts, shuffle, teacher)


def first_architecture(config: Config, source: Architecture) -> Architecture:
    """The units of `source` that a run begins with: all of them, or those of `model.architecture`. Raises UserError:
    that file cannot be read, or is of another model."""
    if config.model.architecture is None:
        return source
    path, field = Path(config.model.architecture), "model.architecture (--architecture)"
    try:
        found = Architecture.from_json(read_json(Path(os.path.realpath(path))))  # a link that the user named is meant
    except UserError as error:
        raise UserError(f"{field}: {path}: {str(error).removeprefix('architecture.json: ')}") from error
    alive = found.shape == source.shape and all(
        np.isin(ids, source.ids(kind, site)).all() for kind in found.live for site, ids in enumerate(found.sites(kind))
    )
    if not alive:
        raise UserError(
            f"{field}: {path} is of another model than {config.model.hf_model}; name the one it was pruned from"
        )
    return found


def _resumes(config: Config, record: RunRecord) -> bool:
    return record.is_run and not config.checkpoint.finetune


def reads_on(config: Config, record: RunRecord) -> bool:
    """Whether this run goes on in the data where the checkpoint's stopped."""
    return _resumes(config, record) and bool(record.state.get("consumed_samples"))


def _record(config: Config) -> RunRecord | None:
    """What to resume, or None to start from hf_model.

    A command that names one folder as save and load can be given again and again: as long as nothing is saved there,
    it starts from hf_model.
    """
    checkpoint = config.checkpoint
    if checkpoint.load is None:
        return None
    may_start = config.model.hf_model is not None and checkpoint.ckpt_step is None and _loads_its_own(config)
    if may_start and not holds_checkpoint(Path(checkpoint.load)):
        logger.info("%s: no checkpoint yet, starting from %s", checkpoint.load, config.model.hf_model)
        return None
    return RunRecord.read(checkpoint.load, checkpoint.ckpt_step)


# What pruned before there was an option for it: such a run's configuration does not name it.
_UNNAMED = Config(pruning=PruningConfig(schedule="ratio", balance=0.0))


def _tell_changes(config: Config, record: RunRecord) -> None:
    """Log what is pruned by other options than in the checkpoint's run, also where it is a default that has changed.
    Raises UserError: a run that prunes by a ratio would go on by the curve, though nobody asks for it."""
    try:
        before = read_file(record.path / CONFIG_FILE, _UNNAMED).pruning
    except UserError as error:
        logger.warning("what the run was pruned by so far is not known: %s", error)
        return
    now_by_curve = config.pruning.enabled and config.pruning.follows_curve
    goes_over = before.enabled and not before.follows_curve and now_by_curve and config.pruning.schedule is None
    if goes_over and record.iteration:
        ratio = before.ratio or "1:1"
        raise UserError(
            f"pruning.schedule: the run in {record.path.parent} prunes by the ratio {ratio}, and this command names "
            f"none, which means a curve; give --prune-ratio {ratio} to go on, or --prune-schedule curve"
        )
    for field in dataclasses.fields(before):
        then, now = getattr(before, field.name), getattr(config.pruning, field.name)
        if then != now:
            words = (field.name, yaml_value(then), yaml_value(now))
            logger.warning("pruning.%s: %s until this checkpoint, %s from here on", *words)


def _loads_its_own(config: Config) -> bool:
    """Whether the folder that is loaded from is the one that is saved to."""
    load, save = config.checkpoint.load, config.checkpoint.save
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def tokenizer_place(config: Config, record: RunRecord | None) -> tuple[str | None, str]:
    """(type, path): as configured, else the one the checkpoint was trained with, else the source folder's."""
    if config.data.tokenizer_model:
        return config.data.tokenizer_type, config.data.tokenizer_model
    recorded = tokenizer_of(record.state) if record is not None else None
    if recorded is not None and (Path(recorded[1]).exists() or not config.model.hf_model):
        return recorded
    if config.model.hf_model:
        return config.data.tokenizer_type, config.model.hf_model
    raise UserError("data.tokenizer_model (--tokenizer-model) is not set, and the checkpoint does not name one")


def check_context(config: Config, architecture: Architecture) -> None:
    """Raise UserError if sequences are longer than the model's positions."""
    longest = architecture.shape.max_position_embeddings
    if config.data.seq_length > longest:
        raise UserError(f"data.seq_length: {config.data.seq_length} is beyond the model's {longest} positions")


def check_target(config: Config, architecture: Architecture) -> None:
    """Raise UserError if the target, where there is one, cannot be reached from `architecture`, or if the options of
    groups name or exceed what it has not."""
    pruning = config.pruning
    if not pruning.enabled:
        return
    find_criterion(pruning.metric)
    _check_groups(pruning, architecture)
    _check_layers(config)
    shape = architecture.shape
    if pruning.target.kv_cache_per_token and pruning.gqa != "kv_group" and shape.heads_per_group > 1:
        raise UserError(
            "pruning.target: kv_cache_per_token needs pruning.gqa: kv_group, where a KV head leaves with its queries"
        )
    if pruning.gqa == "cluster" and shape.heads_per_group > 1 and architecture.table.norms_followers:
        raise UserError(
            "pruning.gqa: cluster leaves KV heads that serve different numbers of query heads; a model of type "
            f"{shape.model_type} norms keys over all of them, and no export could hold that; use kv_group or uniform"
        )
    rules = selector_rules(config, architecture)
    if config.checkpoint.load is None:
        refuse_met(rules.budget, architecture, "source", "; give a smaller target, or null to train without pruning")
    least = least_architecture(architecture, rules)
    for limit in rules.budget.limits:
        if limit.of(least) > limit.most:
            raise UserError(
                f"{limit.field}: {limit.most:,} cannot be reached: at the floors of {', '.join(pruning.types)} "
                f"{limit.of(least):,} {limit.title} are left; allow more types or raise the target"
            )


def refuse_met(budget: Budget, architecture: Architecture, whose: str, advice: str = "") -> None:
    """Raise UserError if `architecture` keeps all limits as it is."""
    if budget.is_met(architecture):
        limit = budget.binding(architecture)
        raise UserError(
            f"{limit.field}: {limit.most:,} is not below the {whose}'s {limit.of(architecture):,} {limit.title}{advice}"
        )


def _check_groups(pruning: PruningConfig, architecture: Architecture) -> None:
    for name in pruning.types:
        find_group(name)
    for name, group in pruning.groups.items():
        width = architecture.width(find_group(name, "pruning.groups").kind)
        for field in ("floor", "round_to"):
            if (getattr(group, field) or 1) > width:
                raise UserError(f"pruning.groups: {name}: {field} {getattr(group, field)} is above the model's {width}")
        known = find_group(name).scores
        if group.score not in known:
            raise UserError(f'pruning.groups: {name}: score "{one_line(group.score)}" is none of {", ".join(known)}')
        if group.score != known[0] and pruning.metric == "random":
            raise UserError(f"pruning.groups: {name}: score {group.score} has no say with metric random; drop one")


def _check_layers(config: Config) -> None:
    """Refuse what does not go with removing layers so far."""
    if not any(find_group(name).kind == LAYER for name in config.pruning.types):
        return
    model = config.model
    refused = {
        "model.engine hybrid (use gpt)": engine_of(model.engine) == HYBRID,
        "pruning.second_order": config.pruning.second_order.enabled,
        "model.recompute_num_layers above 1": model.recompute_method == "uniform" and model.recompute_num_layers != 1,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise UserError(f"pruning.types: {LAYER} does not go with {what}, so far")


def check_output(config: Config) -> None:
    """Raise UserError if the run may not write into its output folder."""
    if config.checkpoint.save is None:
        return
    save, is_taken = Path(config.checkpoint.save), holds_checkpoint(Path(config.checkpoint.save))
    refuse_step(save, "checkpoint.save")
    if is_taken and config.checkpoint.finetune:
        raise UserError(
            f"checkpoint.finetune begins a new run, and checkpoint.save ({save}) already holds one; give another "
            f"folder, or resume that run with --load {save} --no-finetune"
        )
    if is_taken and not _loads_its_own(config):
        raise UserError(
            f"checkpoint.save: {save} already holds a run's checkpoints; resume it with --load {save}, or give another "
            "folder"
        )
    if save.exists() and not save.is_dir():
        raise UserError(f"checkpoint.save: {save} is a file; give a folder")
