"""What a pruned model may cost, and which limit holds it back.

The limit that binds is the one that the model exceeds most, relatively. A model's *size* is counted in units of the
first limit: its value there, or, while another one binds, as many times the first limit as that one is exceeded. So
with one limit the size is its value (parameters: a whole number), and the target is reached when the size is no more
than the first limit, whichever binds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import Kind
from megatron_prune.model.table import ATTENTION_OUTPUT, EMBEDDING, LINEARS, LM_HEAD, QKV, ParamTable

PARAMS, FLOPS, KV_CACHE, LATENCY = "params", "flops_per_token", "kv_cache_per_token", "latency"
TITLES = {
    PARAMS: "parameters",
    FLOPS: "FLOPs per token, forward",
    KV_CACHE: "KV cache elements per token",
    LATENCY: "milliseconds by the table",
}

Counts = Mapping[Kind, np.ndarray]  # as `Architecture.counts`; whole numbers, or shares of such
Measure = Callable[[ParamTable, Counts], float]


def parameters(table: ParamTable, counts: Counts) -> float:
    """Parameters, a tied LM head counted once."""
    return table.elements(counts)


def flops_per_token(table: ParamTable, counts: Counts, seq_length: int) -> float:
    """FLOPs of a forward pass: 2 per multiply-add of matrices and logits, attention over `seq_length` tokens."""
    head = EMBEDDING if table.shape.tie_word_embeddings else LM_HEAD
    attended = table.channels(counts, ATTENTION_OUTPUT, dim=1)
    return float(2 * table.elements(counts, (*LINEARS, head)) + 4 * seq_length * attended)


def forward_flops(architecture: Architecture, seq_length: int) -> float:
    """FLOPs per token of a forward pass of a whole model, such as a teacher's."""
    return flops_per_token(architecture.table, architecture.counts, seq_length)


def training_flops(architecture: Architecture, seq_length: int) -> float:
    """FLOPs to train on one token: by the usual convention backward takes twice the forward, and attention is not
    halved for causality."""
    return 3.0 * forward_flops(architecture, seq_length)


def kv_cache_per_token(table: ParamTable, counts: Counts) -> float:
    """Elements that a KV cache holds per token: keys and values of all layers."""
    return float(table.channels(counts, QKV, dim=0, after=1))


@dataclass(frozen=True)
class Limit:
    """The most that a model may have of one thing.

    Args:
        name: of the budget, as in `pruning.target`. most: the limit.
        measure: what a model has of it; for whole models and for shares of one, growing with every width.
    """

    name: str
    most: float
    measure: Measure = field(compare=False)

    @property
    def field(self) -> str:
        """The option that sets it."""
        return "pruning.target_params" if self.name == PARAMS else f"pruning.target: {self.name}"

    @property
    def title(self) -> str:
        """What it counts, for people."""
        return TITLES[self.name]

    def of(self, architecture: Architecture) -> float:
        """What `architecture` has of it."""
        if self.name == PARAMS:
            return architecture.parameters
        return self.measure(architecture.table, architecture.counts)


@dataclass(frozen=True)
class Budget:
    """Limits that hold at once, at least one; sizes are in units of the first."""

    limits: tuple[Limit, ...]

    @property
    def target(self) -> float:
        """The size at which all limits are kept."""
        return self.limits[0].most

    def described(self) -> str:
        """The limits, for people: `130000` parameters, or with the names of others."""
        named = [f"{limit.most:,} {limit.title}" for limit in self.limits]
        is_plain = len(named) == 1 and self.limits[0].name == PARAMS
        return str(self.target) if is_plain else ", ".join(named)

    def binding(self, architecture: Architecture) -> Limit:
        """The limit that `architecture` exceeds most (or comes nearest to), the first of equals."""
        if len(self.limits) == 1:
            return self.limits[0]
        return max(self.limits, key=lambda limit: limit.of(architecture) / limit.most)

    def size(self, architecture: Architecture) -> float:
        """How large it is; see the module."""
        limit = self.binding(architecture)
        value = limit.of(architecture)
        return value if limit is self.limits[0] else self.target * (value / limit.most)

    def is_met(self, architecture: Architecture) -> bool:
        """Whether it keeps all limits."""
        return self.size(architecture) <= self.target
