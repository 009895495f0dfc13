"""--dry-run: check everything that can be checked without starting, and say what the run will cost.

    dry_run      check, estimate, write the report
    look         open what the configuration names, as far as it is here
    estimate     numbers of the run: memory, route to the target, time, traffic

Needs no accelerator and no other process, so that a run of 64 ranks is checked on a laptop. The source's `config.json`
must be there. Weights, tokenizer and data that are not there are reported and left to the launch, which checks them
again; what is there and damaged, or does not fit, is an error.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from megatron_prune.checkpoint.files import holds_checkpoint
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.config import Config
from megatron_prune.data.datasets import Blend, blend_words, check_documents, check_vocabulary, parse_blend, read_weight
from megatron_prune.data.indexed import bin_path, idx_path
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.data.tokenizer_files import holds_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.launch.assembly import opening, outputs
from megatron_prune.launch.assembly.assemble import model_options, quanta
from megatron_prune.launch.assembly.data_order import check_order, splits_read
from megatron_prune.launch.assembly.teaching import lesson, open_teacher, teacher_place
from megatron_prune.launch.estimate.placement import Placement
from megatron_prune.launch.estimate.rank_memory import fullest_rank
from megatron_prune.launch.estimate.report import Estimate, Finding, render
from megatron_prune.launch.estimate.route import plan_phases, plan_plain, plan_route, removal_iters
from megatron_prune.launch.estimate.traffic import compactions, pruning_traffic, stage_moves, training_traffic
from megatron_prune.launch.jobs import after
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import transformer_config
from megatron_prune.pruning.budget import forward_flops
from megatron_prune.runtime.folders import hindrance
from megatron_prune.runtime.mesh import Mesh
from megatron_prune.saliency.criteria import find_criterion
from megatron_prune.training.pruning_settings import pruning_schedule, selector_rules

NOT_HERE = "not here (checked at launch)"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


def dry_run(config: Config, world_size: int) -> int:
    """Check a valid `config` (see `config.validate`) for `world_size` processes and write the report to stdout.

    Returns:
        0, the exit status.

    Raises:
        UserError: something that is here does not fit, is damaged, or contradicts the configuration.
    """
    found = look(config)
    text = render(config, found.findings, estimate(config, found.architecture, world_size, found.teacher))
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


@dataclass(frozen=True)
class Found:
    """What the run starts with, and a line on each thing it reads."""

    architecture: Architecture
    findings: tuple[Finding, ...]
    teacher: Architecture | None = None


def look(config: Config) -> Found:
    """Open and check what `config` names, as far as it is here. Raises UserError: no `config.json`, damaged files, or
    anything that `launch.assembly.opening` would refuse."""
    findings: list[Finding] = []
    record, architecture = _source(config, findings)
    tokenizer = _tokenizer(config, record, findings)
    train, valid = splits_read(config)
    for field, text, read in (
        ("data.data_path (--data-path)", config.data.data_path, train),
        ("data.valid_data_path (--valid-data-path)", config.data.valid_data_path, valid),
    ):
        if text and read is not None:
            blend, is_whole = _data(text, field, architecture.shape.vocab_size, tokenizer, findings)
            check_documents(blend, read.split, read.samples, config.data.seq_length)
            if is_whole and read is train and record is not None and opening.reads_on(config, record):
                check_order(config, blend, record.state.get("data_order"))
    _tasks(config, findings)
    opening.check_context(config, architecture)
    opening.check_target(config, architecture)
    _output(config, findings)
    return Found(architecture, tuple(findings), _teacher(config, architecture, tokenizer, findings))


def _teacher(
    config: Config, student: Architecture, tokenizer: Tokenizer | None, findings: list[Finding]
) -> Architecture | None:
    """The teacher's architecture; where it is not here, it is taken to be as large as what it teaches."""
    if not config.distillation.weight:
        return None
    place = teacher_place(config)
    if tokenizer is not None and (holds_checkpoint(place) or any(next(place.glob(p), None) for p in _WEIGHTS)):
        found = open_teacher(config, student, tokenizer)
        assert found is not None
        first = lesson(config)
        trained = "" if first is None else f", trained for {first.training.train_iters:,} iterations first"
        findings.append(Finding(f"teacher in {place}", f"{found.architecture.parameters:,} parameters{trained}"))
        return found.architecture
    findings.append(Finding(f"teacher in {place}", f"{NOT_HERE}, counted like the source"))
    return student


def _output(config: Config, findings: list[Finding]) -> None:
    """A dry run touches nothing: a folder that holds a run is told, not refused."""
    try:
        opening.check_output(config)
    except UserError as error:
        if not Path(config.checkpoint.save or "").is_dir():
            raise
        findings.append(Finding("output", f"the launch will refuse: {error}"))
    for field, place in outputs.places(config).items():
        reason = hindrance(place)
        if reason is not None:
            findings.append(Finding("output", f"the launch will refuse: {field}: {reason}"))
    if config.logging.wandb_project and find_spec("wandb") is None:
        findings.append(Finding("wandb", NOT_HERE))


def _source(config: Config, findings: list[Finding]) -> tuple[RunRecord | None, Architecture]:
    """The checkpoint, if one is named and here, and the architecture to start with."""
    load, folder = config.checkpoint.load, config.model.hf_model
    if load is not None and Path(load).exists():
        record = RunRecord.read(load, config.checkpoint.ckpt_step)
        findings.append(Finding(str(record.path), f"checkpoint of iteration {record.iteration}"))
        return record, record.architecture
    if load is not None:
        findings.append(Finding(f"checkpoint in {load}", NOT_HERE))
    if folder is None:
        raise UserError(
            f"checkpoint.load (--load): {load} does not exist, and without it the model is not known; name "
            "model.hf_model (--hf-model) too"
        )
    architecture = read_architecture(folder)
    if config.model.architecture is not None:
        findings.append(Finding(config.model.architecture, "the units to begin with"))
    findings.append(Finding(f"{folder}/config.json", f"{architecture.shape.model_type}, {_shape(architecture)}"))
    if config.model.init == "random":
        findings.append(Finding("weights", "drawn at random (model.init)"))
    elif any(next(Path(folder).glob(pattern), None) for pattern in _WEIGHTS):
        weights = FolderWeights(folder)
        weights.check(architecture)
        findings.append(Finding(f"weights in {folder}", f"complete, {weights.total_bytes / 1e9:,.3f} GB"))
    else:
        findings.append(Finding(f"weights in {folder}", NOT_HERE))
    return None, opening.first_architecture(config, architecture)


def _shape(architecture: Architecture) -> str:
    shape = architecture.shape
    tied = "tied" if shape.tie_word_embeddings else "untied"
    return f"{shape.num_layers} layers, vocabulary {shape.vocab_size} ({tied}), head dimension {shape.kv_channels}"


def _tokenizer(config: Config, record: RunRecord | None, findings: list[Finding]) -> Tokenizer | None:
    kind, place = opening.tokenizer_place(config, record)
    path = Path(place)
    if path.is_file() or holds_tokenizer(path):
        tokenizer = build_tokenizer(kind, place)
        findings.append(Finding(f"tokenizer in {place}", f"{tokenizer.kind}, {tokenizer.vocab_size} ids"))
        return tokenizer
    findings.append(Finding(f"tokenizer in {place}", NOT_HERE))
    return None


def _data(
    text: str, field: str, vocab_size: int, tokenizer: Tokenizer | None, findings: list[Finding]
) -> tuple[Blend, bool]:
    """Check a blend whose data sets may be absent, but not halves of them; (what is here, whether that is all)."""
    words = blend_words(text, field)
    prefixes = words if len(words) == 1 else words[1::2]
    absent = [p for p in prefixes if not bin_path(p).exists() and not idx_path(p).exists()]
    if len(words) == 1 or len(words) % 2 or not absent:
        pairs = [text] if not absent or len(words) > 1 else []
    else:
        pairs = [
            f"{weight} {shlex.quote(prefix)}" for weight, prefix in zip(words[::2], prefixes) if prefix not in absent
        ]
        for word in words[::2]:
            read_weight(word, field)
    blends = [parse_blend(pair, vocab_size, field) for pair in pairs]
    present = Blend(tuple(data for blend in blends for data in blend.data), None) if absent else blends[0]
    if tokenizer is not None and present.data:
        check_vocabulary(tokenizer, present, vocab_size)
    sizes = {data.prefix: f"{data.sequences:,} documents, {data.tokens:,} tokens" for data in present.data}
    findings += [Finding(f"data {prefix}", sizes.get(prefix, NOT_HERE)) for prefix in prefixes]
    return present, not absent


def _tasks(config: Config, findings: list[Finding]) -> None:
    tasks, folder = config.evaluation.eval_tasks, config.evaluation.eval_task_data
    if tasks is not None:
        is_here = folder is None or Path(folder).exists()
        findings.append(Finding(f"tasks {tasks}", (after.check(config) or "by lm-eval") if is_here else NOT_HERE))


# Numbers ----------------------------------------------------------------------------------------------------------


def estimate(
    config: Config, architecture: Architecture, world_size: int, teacher: Architecture | None = None
) -> Estimate:
    """Everything the report says about a run that starts with `architecture` and learns from `teacher`. Raises
    UserError: the layers do not split over the pipeline stages, or options of the model contradict each other."""
    placement = Placement.plan(config, world_size, architecture.shape.num_layers)
    layout = ShardLayout.pack(architecture, placement.tp, quanta(config))
    placement = placement.of(config, layout.layers)
    _check_model(config, layout, placement)
    pruning = config.pruning
    scores = pruning.enabled and not selector_rules(config, architecture).budget.is_met(architecture)
    fisher = scores and pruning.fisher == "microbatch" and "fisher" in find_criterion(pruning.metric).needs
    taught = None if teacher is None else ShardLayout.pack(teacher, placement.tp, quanta(config))
    flops = 0.0 if teacher is None else forward_flops(teacher, config.data.seq_length)
    start = fullest_rank(config, layout, placement, fisher, taught)
    traffic = training_traffic(config, layout, placement, start.stage)
    if not scores:
        phases = plan_plain(config, architecture, flops)
        return Estimate(world_size, placement, layout, None, None, start, None, phases, traffic, [], None, 0, 0)
    route = plan_route(config, architecture)
    iterations = removal_iters(pruning_schedule(config, architecture), route, config.tokens_per_iteration)
    target_layout = ShardLayout.pack(route.target, placement.tp, quanta(config))
    due, later = compactions(layout, route, iterations), config.after_target
    small = Placement.plan(later, world_size, architecture.shape.num_layers).of(later, target_layout.layers)
    gone = int(np.searchsorted(iterations, due[0], side="right")) if due else 0
    first = ShardLayout.pack(route.after(gone), placement.tp, quanta(config)) if due else None
    on_top, compaction = pruning_traffic(config, layout, placement, start.stage, fisher, first)
    return Estimate(
        world_size=world_size,
        placement=placement,
        layout=layout,
        target_layout=target_layout,
        route=route,
        memory=start,
        target_memory=fullest_rank(later, target_layout, small, teacher=taught),
        phases=plan_phases(config, route, iterations, flops),
        traffic=traffic,
        pruning_traffic=on_top,
        compaction=compaction,
        compactions=len(due),
        stage_moves=stage_moves(config, layout, placement, route, iterations),
        scorings=len(np.unique(iterations)),
    )


def _check_model(config: Config, layout: ShardLayout, placement: Placement) -> None:
    """Let megatron-core judge the options; it asks the mesh for three facts only."""
    mesh = SimpleNamespace(tp_size=placement.tp, pp_size=placement.pp, pp_rank=0, device=SimpleNamespace(kind="cpu"))
    transformer_config(layout.architecture.shape, layout, cast(Mesh, mesh), model_options(config))
