"""The dense oracle: the whole method in plain torch, one process, no sharding, nothing hidden.

    OracleSettings   optimizer, criterion, choice and schedule of a run (`oracle_settings`)
    DenseOracle      weights, Adam moments and live units; `train_step` does one pruning-aware iteration
    StepResult       loss, gradient norm and removals of an iteration
    OracleRemoval    one removed group

One iteration, in this order (EfficientLLM, arXiv 2502.06663): gradient of the mean loss over the micro-batches; if a
group is due, element scores S at (w_t, g_t), g before clipping; clip and AdamW; then, as long as the schedule has
credit, choose a group and cut it out of weights, moments and S. Everything is held physically small, so a removed unit
cannot come back and needs no mask. The sharded system must give the same losses and the same removals.

`iteration` counts finished iterations; the first train_step is iteration 1.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from megatron_prune.errors import UserError
from megatron_prune.testing.reference import oracle_geometry, oracle_model, oracle_scores, oracle_second_order
from megatron_prune.testing.reference.oracle_geometry import (
    Geometry,
    LiveUnits,
    count,
    output_projections,
    shrink,
    weight_shapes,
)
from megatron_prune.testing.reference.oracle_scores import OracleScores, Units
from megatron_prune.testing.reference.oracle_settings import OracleSettings

MicroBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class OracleRemoval:
    """One removed group.

    Args:
        kind: `head`, `ffn`, `stem` or `layer`.
        units: original ids: one tuple per layer for heads and FFN channels, one tuple of one id for stem and layers.
        scores: the saliencies it was chosen by (only the kinds that had a candidate).
        margin: relative gap between its score and the best alternative's; infinite without one.
        parameters_after: parameters of the model once it is gone.
        iteration: the iteration it was removed in, counted from 1.
        layer_errors: mean squared output error of the layers (without, with the second-order update), if one was made.
    """

    kind: str
    units: Units
    scores: Mapping[str, float]
    margin: float
    parameters_after: int
    iteration: int
    layer_errors: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scores:
    """S of the output projections by name, the one to sum for stem channels where a criterion has two, and block
    influence by layer where that is asked for."""

    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor] | None = None
    influence: Mapping[int, float] | None = None


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the micro-batches, global gradient norm before clipping, and the groups removed afterwards."""

    loss: float
    grad_norm: float
    removed: list[OracleRemoval]


class DenseOracle:
    """A Llama that trains and shrinks.

    Args:
        config: content of the SOURCE model's Hugging Face `config.json`.
        weights: {Hugging Face name: tensor}; copied and converted to `dtype`. A tied `lm_head.weight` is ignored.
        settings: the run.
        dtype: torch.float32 or torch.float64, for weights, gradients, moments and scores alike.
        live: units that `weights` hold; default all of the source model's.
        teacher: logits [B, S, vocab] of tokens [B, S], for `settings.distillation`.

    Attributes:
        weights, exp_avg, exp_avg_sq: {name: tensor}, physically small.
        adam_step: steps that the moments are made of (bias correction).
        live: LiveUnits; iteration, tokens: finished and consumed; credits: pruning steps left over.
        smoothed: unit scores of the last choice; removals: all of them, in order.

    Raises:
        UserError: a weight is missing, unknown, or of another shape than the configuration says.
    """

    def __init__(
        self,
        config: Mapping,
        weights: Mapping[str, Tensor],
        settings: OracleSettings | None = None,
        dtype: torch.dtype = torch.float32,
        live: LiveUnits | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.geometry = Geometry.from_hf(config)
        self.settings, self.teacher = settings or OracleSettings(), teacher
        self.live = live or LiveUnits.full(self.geometry)
        expected = weight_shapes(self.geometry, self.live)
        given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if self.geometry.tied:
            given.pop("lm_head.weight", None)
        if given != expected:
            wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            raise UserError(f"weights: missing, unknown or of another shape than the config says: {', '.join(wrong)}")
        self.weights = {name: weights[name].detach().to(dtype).clone() for name in expected}
        self._begin_adam()
        self.iteration = self.tokens = 0
        self.credits = 0.0
        self.source = self.live
        self.smoothed: OracleScores | None = None
        self.removals: list[OracleRemoval] = []

    # Evaluation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, vocab] of int64 tokens [B, S]."""
        return oracle_model.logits(tokens, self.weights, self.geometry, self.live)

    @torch.no_grad()
    def loss(self, tokens: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy in nats per token; tokens and labels are int64 [B, S]."""
        return self._loss(self.weights, tokens, labels).item()

    def parameters(self) -> int:
        """Parameters alive; a tied embedding counts once."""
        return count(self.geometry, self.live)

    def hf_state(self) -> dict[str, Tensor]:
        """Copies of the weights under their Hugging Face names (without a tied `lm_head.weight`)."""
        return {name: weight.clone() for name, weight in self.weights.items()}

    def _loss(self, weights: Mapping[str, Tensor], tokens: Tensor, labels: Tensor, distilled: bool = False) -> Tensor:
        """Cross entropy; `distilled`: (1 - w) of it + w T^2 KL(teacher || student), both at temperature T."""
        logits = oracle_model.logits(tokens, weights, self.geometry, self.live)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        w, temperature = self.settings.distillation
        if not distilled or not w:
            return loss
        assert self.teacher is not None
        log_p, log_q = (log_softmax(x / temperature, dim=-1) for x in (logits, self.teacher(tokens)))
        divergence = (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean()
        return (1 - w) * loss + w * temperature**2 * divergence

    # One iteration ---------------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One pruning-aware iteration over the global batch, given as (tokens [B, S], labels [B, S]) of equal shapes.
        Raises FloatingPointError: the loss or the gradient is not finite (the oracle has no policy for that)."""
        self.iteration += 1
        self.tokens += sum(tokens.numel() for tokens, _ in micro_batches)
        scheduled = self._is_scheduled()
        due = scheduled and (self._may_prune(self.credits + self._income()) or self.settings.score_idle)
        distilled = not (due and self.settings.distilled_scores == "cross_entropy")
        loss, gradient, squares = self.gradients(micro_batches, distilled)
        scores = self._scores(micro_batches, gradient, squares) if due else None
        inputs = self.inputs(micro_batches) if due and self.settings.second_order else None
        grad_norm = self._optimizer_step(gradient)
        removed = self._prune(scores, inputs) if scheduled else []
        return StepResult(loss, grad_norm, removed)

    def gradients(
        self, micro_batches: Sequence[MicroBatch], distilled: bool = True
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """Mean loss (`distilled`, if the settings say so), its gradient, and the mean over micro-batches of the squares
        of their own gradients times the Fisher scale (output projections only). The gradient of a micro-batch is that
        of its own mean loss."""
        n = len(micro_batches)
        rows, columns = micro_batches[0][0].shape
        assert all(tokens.shape == (rows, columns) for tokens, _ in micro_batches), "micro-batches differ in shape"
        scale = rows if self.settings.fisher_unit == "sequence" else rows * columns
        total_loss = 0.0
        gradient = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        squares = {name: torch.zeros_like(self.weights[name]) for name in output_projections(self.live)}
        for tokens, labels in micro_batches:
            leaves = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
            loss = self._loss(leaves, tokens, labels, distilled)
            total_loss += loss.item() / n
            for name, own in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                gradient[name] += own / n
                if name in squares:
                    squares[name] += scale * own.square() / n
        if not math.isfinite(total_loss):
            raise FloatingPointError(f"iteration {self.iteration}: the loss is {total_loss}")
        return total_loss, gradient, squares

    def element_scores(self, gradient: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S of every element of the output projections, from what `gradients` returned and the weights as they are."""
        scores = {}
        for name in output_projections(self.live):
            fisher = {
                "microbatch": squares[name],
                "adam": self.exp_avg_sq[name],
                "batch": gradient[name].square(),
            }[self.settings.fisher]
            scores[name] = oracle_scores.element_scores(
                self.settings.criterion, self.weights[name], gradient[name], fisher
            )
        return scores

    @torch.no_grad()
    def inputs(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """The input [tokens, features] of every linear layer over these micro-batches, by its weight's name."""
        found: dict[str, list[Tensor]] = {}
        for tokens, _ in micro_batches:
            oracle_model.logits(
                tokens,
                self.weights,
                self.geometry,
                self.live,
                lambda name, x: found.setdefault(name, []).append(x.flatten(0, 1)),
            )
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def input_scores(self, inputs: Mapping[str, Tensor]) -> Scores:
        """S from the layers' inputs, for the criteria that are made of them."""
        names, criterion = output_projections(self.live), self.settings.criterion
        columns = {
            name: oracle_scores.input_scores(criterion, self.weights[name], inputs[name], self.settings.damping)
            for name in names
        }
        if criterion != "minitron":
            return Scores(columns)
        entrances = {"o_proj": "q_proj", "down_proj": "gate_proj"}
        rows = {}
        for name in names:
            own = name.split(".")[-2]
            mean = inputs[name.replace(own, entrances[own])].double().abs().mean(dim=0)
            rows[name] = mean[:, None].expand_as(self.weights[name])
        return Scores(columns, rows)

    def unit_scores(self, micro_batches: Sequence[MicroBatch]) -> OracleScores:
        """Sums of S per live unit for these micro-batches, unsmoothed; changes nothing."""
        _, gradient, squares = self.gradients(micro_batches)
        return self._summed(self._scores(micro_batches, gradient, squares))

    def _scores(
        self, micro_batches: Sequence[MicroBatch], gradient: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> Scores:
        influence = self.block_influence(micro_batches) if self.settings.layer_score == "block_influence" else None
        if self.settings.criterion in oracle_scores.INPUT_CRITERIA:
            return dataclasses.replace(self.input_scores(self.inputs(micro_batches)), influence=influence)
        return Scores(self.element_scores(gradient, squares), influence=influence)

    @torch.no_grad()
    def block_influence(self, micro_batches: Sequence[MicroBatch]) -> dict[int, float]:
        """1 - cosine of each live layer's input and output, mean over all tokens."""
        streams = (oracle_model.residual_stream(x, self.weights, self.geometry, self.live) for x, _ in micro_batches)
        means = torch.tensor([oracle_scores.block_influence(states) for states in streams]).mean(dim=0)
        return dict(zip(self.live.layers, means.tolist(), strict=True))

    def _summed(self, scores: Scores) -> OracleScores:
        return oracle_scores.unit_scores(scores.columns, self.geometry, self.live, scores.rows, scores.influence)

    def _begin_adam(self) -> None:
        self.adam_step = 0
        self.exp_avg = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def _optimizer_step(self, gradient: Mapping[str, Tensor]) -> float:
        """Clip by the global norm as Megatron does, then AdamW (decoupled decay, bias correction)."""
        settings = self.settings
        grad_norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient.values()))
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"iteration {self.iteration}: the gradient norm is {grad_norm}")
        clip = min(1.0, settings.clip_grad / (grad_norm + 1e-6)) if settings.clip_grad > 0 else 1.0
        lr = settings.lr(self.iteration - 1) if callable(settings.lr) else settings.lr
        beta1, beta2 = settings.betas
        self.adam_step += 1
        step = self.adam_step
        for name, weight in self.weights.items():
            g, mean, square = gradient[name] * clip, self.exp_avg[name], self.exp_avg_sq[name]
            if weight.dim() == 2:
                weight.mul_(1 - lr * settings.weight_decay)
            mean.mul_(beta1).add_(g, alpha=1 - beta1)
            square.mul_(beta2).add_(g.square(), alpha=1 - beta2)
            denominator = square.sqrt() / math.sqrt(1 - beta2**step) + settings.eps
            weight.sub_(mean / denominator, alpha=lr / (1 - beta1**step))
        return grad_norm

    # Pruning ---------------------------------------------------------------------------------------------------------

    def _above_target(self) -> bool:
        return bool(self.settings.target) and self._size() > self._target()

    def _target(self) -> float:
        return next(iter(self.settings.target.values()))

    def _size(self, live: LiveUnits | None = None) -> float:
        """The model's size (of these live units) by the limit that binds."""
        costs = oracle_geometry.costs(self.geometry, live or self.live, self.settings.seq_length)
        return oracle_scores.size(costs, self.settings.target)

    def _allowed_size(self) -> float:
        """The curve: target + (source - target) (1 - u)^p, u the share of the way between its ends in tokens."""
        settings, (start, end) = self.settings, self.settings.curve
        left = 1 - min(max((self.tokens - start) / (end - start), 0), 1)
        share = left**3 if settings.schedule == "cubic" else left
        return self._target() + (self._size(self.source) - self._target()) * share

    def _income(self) -> int:
        return self.settings.ratio[0] if self.settings.schedule == "ratio" else 0

    def _may_prune(self, credits: float) -> bool:
        if self.settings.schedule != "ratio":
            return self._above_target() and self._size() > self._allowed_size()
        return credits >= 1 and self._above_target()

    def _is_scheduled(self) -> bool:
        if self.settings.schedule != "ratio":
            return self._may_prune(0)
        since = self.iteration - self.settings.first_prune_iter
        return since >= 0 and since % self.settings.ratio[1] == 0 and self._above_target()

    def _prune(self, scores: Scores | None, inputs: dict[str, Tensor] | None) -> list[OracleRemoval]:
        """Remove what is due. Later choices reuse S, summed again without the units that are gone."""
        self.credits += self._income()
        before = self.smoothed
        if scores is not None and not self._may_prune(self.credits):  # score_idle
            self.smoothed = self._smooth(before, scores)
        removed: list[OracleRemoval] = []
        while self._may_prune(self.credits):
            assert scores is not None
            self.smoothed = self._smooth(before, scores)
            rules = self._rules()
            gone = Counter(removal.kind for removal in removed)
            resting = {kind for kind, limit in self.settings.limits.items() if gone[kind] >= limit}
            found = oracle_scores.candidates(self.smoothed, self.geometry, self.live, rules)
            choice = oracle_scores.choose(found, rules, resting) if found else None
            if choice is None:
                break
            best, margin = choice
            live, errors = self.live, self._compensate(best.kind, best.units, inputs)
            columns = self.remove(best.kind, best.units, scores.columns)
            rows = shrink(self.geometry, scores.rows or {}, live, self.live)
            scores = Scores(columns, rows, scores.influence)
            inputs = inputs and oracle_second_order.without(inputs, self.geometry, live, self.live, best.kind)
            if self.settings.schedule == "ratio":
                self.credits -= self.settings.group_cost.get(
                    best.kind, oracle_scores.default_cost(best.kind, self.geometry)
                )
            saliencies = {candidate.kind: candidate.score for candidate in found}
            removal = OracleRemoval(
                best.kind, best.units, saliencies, margin, self.parameters(), self.iteration, errors
            )
            removed.append(removal)
        self.removals += removed
        if removed and self.settings.optimizer_state == "reset":
            self._begin_adam()
        return removed

    def _rules(self) -> oracle_scores.ChoiceRules:
        rules, balance = self.settings.choice_rules, self.settings.balance
        balanced = oracle_scores.balanced_widths(self.geometry, self.source, rules, balance)
        return dataclasses.replace(rules, balanced=balanced)

    def _compensate(self, kind: str, units: Units, inputs: Mapping[str, Tensor] | None) -> tuple[float, float] | None:
        """Second-order update for a group that is about to leave, from the inputs of this iteration's batch."""
        if inputs is None or (oracle_scores.is_shared(kind) and not self.settings.second_order_stem):
            return None
        after = self.live.without(kind, units)
        updated, errors = oracle_second_order.compensated(
            self.weights, inputs, self.geometry, self.live, after, kind, self.settings.damping
        )
        self.weights.update(updated)
        return errors

    def _smooth(self, before: OracleScores | None, scores: Scores) -> OracleScores:
        return oracle_scores.smooth(before, self._summed(scores), self.settings.saliency_momentum)

    def remove(self, kind: str, units: Units, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Cut a group out of weights and both moments, and out of `scores` (S by name), whose rest is returned."""
        before, self.live = self.live, self.live.without(kind, units)

        def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return shrink(self.geometry, tensors, before, self.live)

        self.weights, self.exp_avg, self.exp_avg_sq = cut(self.weights), cut(self.exp_avg), cut(self.exp_avg_sq)
        return cut(scores or {})
