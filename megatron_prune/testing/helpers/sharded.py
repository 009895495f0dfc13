"""The sharded system on small models, in the oracle's terms: same configuration, weights, tokens and settings.

Case          parallel layout and options of one comparison
RandomTokens  a data set whose samples are the oracle's micro-batches
run_case      on one rank: build, train, prune; returns what the oracle returns, plus facts about the end
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_prune.config import (
    Config,
    ContinuedConfig,
    Curve,
    DistillationConfig,
    GroupConfig,
    GroupConfigs,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PruningConfig,
    SecondOrder,
    Target,
    TrainingConfig,
)
from megatron_prune.config.options import filled
from megatron_prune.huggingface.config import shape_from_config
from megatron_prune.launch.assembly.assemble import fresh_model, model_options
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import VOCAB, find_kind
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.teacher import Teacher
from megatron_prune.pruning.groups import known_groups
from megatron_prune.resharding.coordinator import verify
from megatron_prune.runtime.device import DeviceRuntime, choose_device
from megatron_prune.runtime.mesh import Mesh, close_mesh, init_mesh
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle import OracleSettings
from megatron_prune.testing.reference.oracle_settings import LinearDecay
from megatron_prune.training.distillation import Distillation
from megatron_prune.training.metrics import IterationReport, Reporter
from megatron_prune.training.state import RunState
from megatron_prune.training.step import NEXT_TOKEN, Objective
from megatron_prune.training.trainer import Datasets, Trainer


def rounded(vocab: int = 128, **multiples: int) -> Quanta:
    """Quanta by name of kind."""
    return {find_kind(name): multiple for name, multiple in {**multiples, "vocab": vocab}.items()}


SHARED_GPU = "shared-gpu"  # all ranks on the first GPU, over gloo, since NCCL wants one each


@dataclass(frozen=True)
class Case:
    """How the sharded side of a comparison runs.

    Args:
        device: `cpu`, `cuda` or SHARED_GPU.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    bf16: bool = False
    compile: str = "off"
    quanta: Quanta = field(default_factory=lambda: rounded(vocab=8))
    recompute: str | None = None
    first_stage_layers: int | None = None
    round_to: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def world_size(self) -> int:
        """Ranks it needs."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """Short name for test ids."""
        widest = max((multiple for kind, multiple in self.quanta.items() if kind.is_prunable), default=1)
        flags = {
            "sp": self.sequence_parallel,
            "do": self.distributed_optimizer,
            "ov": self.overlap,
            "bf16": self.bf16,
            f"q{widest}": widest > 1,
            f"{self.recompute}-recompute": self.recompute is not None,
            "uneven": self.first_stage_layers is not None,
        }
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}" + "".join(f"-{name}" for name, on in flags.items() if on)

    def applied(self, config: Config) -> Config:
        """`config` with this layout and these options."""
        is_full, groups = self.recompute == "full", config.pruning.groups
        for group in known_groups():
            multiples = {"quantum": self.quanta.get(group.kind, 1), "round_to": self.round_to.get(group.name, 1)}
            groups = groups.having(group.name, **multiples)
        return dataclasses.replace(
            config,
            parallel=ParallelConfig(
                self.tp,
                self.pp,
                self.sequence_parallel,
                self.distributed_optimizer,
                self.overlap,
                self.overlap and self.distributed_optimizer,
                self.first_stage_layers,
                ddp_bucket_size=3000 if self.overlap else None,
            ),
            model=ModelConfig(
                make_vocab_size_divisible_by=self.quanta[VOCAB],
                recompute_granularity=self.recompute,  # type: ignore[arg-type]
                recompute_method="uniform" if is_full else None,
                recompute_num_layers=1 if is_full else None,
                compile=self.compile,  # type: ignore[arg-type]
            ),
            training=dataclasses.replace(config.training, bf16=self.bf16),
            pruning=dataclasses.replace(config.pruning, groups=groups),
        )


_ANY = 10**6  # groups of a kind by one iteration's scores: no limit


def teacher_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A teacher with something to teach: as `weights`, but surer of itself."""
    return {name: weight * 1.5 if weight.dim() > 1 else weight for name, weight in weights.items()}


class RandomTokens:
    """Samples of random tokens, by number, the same for every layout."""

    def __init__(self, vocab_size: int, seq_length: int, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(length, seq_length + 1, generator=generator)
        self._tokens = (uniform.square() * vocab_size).long()  # small ids are frequent: something to learn

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._tokens[index]
        return {"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(len(row) - 1)}

    def micro_batches(self, iteration: int, count: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """The global batch of `iteration` (from 0) as the oracle takes it."""
        rows = [self._tokens[(iteration * count + i) * size : (iteration * count + i + 1) * size] for i in range(count)]
        return [(part[:, :-1], part[:, 1:]) for part in rows]


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: per iteration the loss and gradient norm, the removals, and the end of the run."""

    losses: list[float]
    grad_norms: list[float]
    removals: list[dict[str, Any]]
    parameters: int
    compactions: int
    stored: dict[str, int]


def run_config(settings: OracleSettings, micro_batches: int, micro_batch_size: int, seq_length: int) -> Config:
    """The project's configuration that means the same as the oracle's settings."""
    decay = settings.lr if isinstance(settings.lr, LinearDecay) else None
    assert decay or not callable(settings.lr)
    base, (start, end) = Config(), settings.curve
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, seq_length=seq_length),
        training=TrainingConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batches * micro_batch_size,
            train_iters=decay.iterations if decay else 10**6,
            check_invariants=True,
        ),
        optimizer=OptimizerConfig(
            lr=decay.peak if decay else settings.lr,  # type: ignore[arg-type]
            lr_schedule="whole_run" if decay else "phases",
            lr_decay_style="linear" if decay else "constant",
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
        ),
        continued=ContinuedConfig() if decay else ContinuedConfig(10**9, continue_lr_decay_style="constant"),
        pruning=filled(
            PruningConfig,
            settings,
            target=Target(**settings.limits_besides),  # type: ignore[arg-type]
            schedule="ratio" if settings.schedule == "ratio" else "curve",
            curve=Curve("linear" if settings.schedule == "linear" else "cubic", str(start), str(end)),
            ratio=f"{settings.ratio[0]}:{settings.ratio[1]}",
            types=tuple(settings.types),
            metric=settings.criterion,
            second_order=SecondOrder(settings.second_order, settings.second_order_stem, settings.damping),
            groups=_group_configs(settings),
            finish="exact" if settings.finish == "exact" else "first",
        ),
        distillation=DistillationConfig(
            *settings.distillation,
            scores=settings.distilled_scores,  # type: ignore[arg-type]
        ),
    )


def _group_configs(settings: OracleSettings) -> GroupConfigs:
    return GroupConfigs(
        {
            name: GroupConfig(
                int(settings.group_cost.get(name, 0)) or None,
                floor,
                settings.limits.get(name, _ANY),
                score=settings.layer_score if name == oracle_scores.LAYER else "weights",
            )
            for name, floor in settings.floors.items()
        }
    )


class _Recorder(Reporter):
    """Keeps every report."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, 1, None, is_active=False)
        self.reports: list[IterationReport] = []

    def iteration(self, report: IterationReport, architecture: Architecture) -> None:
        self.reports.append(report)


def _device_of(case: Case) -> DeviceRuntime:
    if case.device == SHARED_GPU:
        return DeviceRuntime("cuda", "gloo", torch.device("cuda", 0))
    return choose_device(case.device)


def run_case(_rank: int, _world_size: int, case: Case, *job: Any, **more: Any) -> Outcome:
    """`train_case` on this rank, on a mesh of its own (call it through `run_ranks`)."""
    mesh = init_mesh(_device_of(case), case.tp, case.pp)
    outcome = train_case(mesh, case, *job, **more)
    close_mesh()
    return outcome


def train_case(
    mesh: Mesh,
    case: Case,
    hf_config: dict[str, Any],
    weights: dict[str, Tensor],
    settings: OracleSettings,
    iterations: int,
    micro_batches: int = 4,
    micro_batch_size: int = 2,
    seq_length: int = 16,
) -> Outcome:
    """Train and prune on this rank of `mesh`, which has the layout of `case`, and return what happened."""
    config = case.applied(run_config(settings, micro_batches, micro_batch_size, seq_length))
    model = fresh_model(config, Architecture.full(shape_from_config(hf_config)), mesh, weights.__getitem__)
    tokens = RandomTokens(hf_config["vocab_size"], seq_length, iterations * micro_batches * micro_batch_size)
    recorder, state = _Recorder(config), RunState()
    objective: Objective = NEXT_TOKEN
    if settings.distillation[0]:
        read = teacher_weights(weights).__getitem__
        layout = ShardLayout.pack(Architecture.full(model.architecture.shape), case.tp, case.quanta)
        teacher = Teacher(layout, mesh, model_options(case.applied(config)), read)
        objective = Distillation(teacher, *settings.distillation)
    trainer = Trainer(config, model, Datasets(tokens, None), state, recorder, objective=objective)
    for _ in range(iterations):
        trainer.iterate()
    verify(model, thorough=True)
    outcome = Outcome(
        losses=[report.loss for report in recorder.reports],
        grad_norms=[report.grad_norm for report in recorder.reports],
        removals=[removal.to_json() for removal in state.history],
        parameters=model.architecture.parameters,
        compactions=trainer.coordinator.compactions,
        stored={kind.name: model.layout.width(kind) for kind in model.table.varying},
    )
    return outcome
