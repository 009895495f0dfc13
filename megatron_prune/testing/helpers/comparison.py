"""The oracle's run and a sharded run of the same model, settings and tokens, held against each other.

A removal may differ where the decision's margin is below `MARGIN`, since rounding decides there; the comparison ends
then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_prune.testing.helpers.sharded import Outcome, RandomTokens, teacher_weights
from megatron_prune.testing.helpers.tiny_models import random_llama_weights
from megatron_prune.testing.reference.oracle import DenseOracle, OracleRemoval, OracleSettings, StepResult
from megatron_prune.testing.reference.oracle_scores import KINDS

MICRO_BATCH, SEQUENCE = 2, 12
MICRO_BATCHES = 2
ITERATIONS = 56
AFTERWARDS = 4
MARGIN = 1e-4
SCORE_ERROR, LAYER_ERROR = 2e-3, 5e-3  # relative, of saliencies and of variant B's reported errors


@dataclass(frozen=True)
class Agreement:
    """How far a sharded run agrees with the oracle.

    Args:
        compared: removals that are the same, from the first on. of: removals of the oracle.
        faults: what differs although rounding does not decide it, one line each.
        loss_errors, norm_errors: relative, per iteration that both ran with the same model.
    """

    compared: int
    of: int
    faults: tuple[str, ...]
    loss_errors: tuple[float, ...]
    norm_errors: tuple[float, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every removal was compared."""
        return self.compared == self.of


def oracle_settings(config: Mapping[str, Any], target: float = 0.35, **changes: Any) -> OracleSettings:
    """Settings that prune to the share `target` of the parameters; `changes` are fields of OracleSettings."""
    size = DenseOracle(config, random_llama_weights(config)).parameters()
    return OracleSettings(**{"lr": 2e-3, "target_params": int(size * target), "group_cost": {KINDS[0]: 3}, **changes})


def oracle_run(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    settings: OracleSettings,
    iterations: int,
    micro_batches: int = MICRO_BATCHES,
) -> tuple[DenseOracle, list[StepResult]]:
    """The oracle after `iterations`, and what each of them gave."""
    teacher = DenseOracle(config, teacher_weights(weights)) if settings.distillation[0] else None
    oracle = DenseOracle(config, weights, settings, teacher=None if teacher is None else teacher.logits)
    tokens = RandomTokens(config["vocab_size"], SEQUENCE, iterations * micro_batches * MICRO_BATCH)
    results = [oracle.train_step(tokens.micro_batches(i, micro_batches, MICRO_BATCH)) for i in range(iterations)]
    return oracle, results


def iterations_of(oracle: DenseOracle, iterations: int) -> int:
    """A few iterations after the oracle's last removal, at most `iterations`."""
    return min(iterations, oracle.removals[-1].iteration + AFTERWARDS)


def hold_together(
    oracle: DenseOracle, expected: Sequence[StepResult], outcome: Outcome, margin: float = MARGIN
) -> Agreement:
    """Compare removals, losses and gradient norms, as long as the sharded run went."""
    compared, faults = 0, list[str]()
    for removal, mine in zip(oracle.removals, outcome.removals, strict=False):
        units = [list(units) for units in removal.units]
        is_same = mine["group"] == removal.kind and mine["gone"][removal.kind] == units
        if removal.margin < margin and not is_same:
            break
        found = _differences(removal, mine) if is_same else [f"{mine['gone']} instead of its own"]
        if found:
            faults += [f"removal {compared}, margin {removal.margin}: {text}" for text in found]
            break
        compared += 1
    is_complete = compared == len(oracle.removals)
    last = len(outcome.losses) if is_complete else oracle.removals[compared].iteration
    if is_complete and (len(outcome.removals) != compared or outcome.parameters != oracle.parameters()):
        faults.append(f"{len(outcome.removals)} removals and {outcome.parameters} parameters at the end")
    return Agreement(
        compared,
        len(oracle.removals),
        tuple(faults),
        tuple(abs(mine / own.loss - 1) for mine, own in zip(outcome.losses[:last], expected)),
        tuple(abs(mine / own.grad_norm - 1) for mine, own in zip(outcome.grad_norms[:last], expected)),
    )


def _differences(removal: OracleRemoval, mine: Mapping[str, Any]) -> list[str]:
    """Lines on what else of the same removal differs."""
    found = []
    if (mine["iteration"], mine["parameters"]) != (removal.iteration, removal.parameters_after):
        found.append(f"in iteration {mine['iteration']}, {mine['parameters']} parameters after it")
    if not _are_close(mine["scores"], removal.scores, SCORE_ERROR):
        found.append(f"scores {mine['scores']} instead of {dict(removal.scores)}")
    if removal.layer_errors is not None:
        own = dict(zip(("removed", "compensated"), removal.layer_errors, strict=True))
        if not _are_close(mine["layer_errors"], own, LAYER_ERROR):
            found.append(f"layer errors {mine['layer_errors']} instead of {own}")
    return found


def _are_close(mine: Mapping[str, float], own: Mapping[str, float], relative: float) -> bool:
    if mine.keys() != own.keys():
        return False
    return all(abs(mine[name] - value) <= relative * abs(value) for name, value in own.items())
