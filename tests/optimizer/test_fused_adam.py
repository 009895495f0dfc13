"""TransformerEngine's and apex's FusedAdam carry their state through retirements and compactions as torch's AdamW does.

Both keep `step` in the parameter group instead of the parameter's state. Where neither is installed, that interface is
exercised by an optimizer written to it in plain torch; the real ones run where they and a GPU are.
"""

import contextlib
import dataclasses
import importlib

import megatron.core.optimizer as megatron_optimizer
import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.testing.helpers.sharded import Case, rounded, run_case
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config
from megatron_prune.testing.reference.oracle import OracleSettings

CONFIG = tiny_config(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SETTINGS = OracleSettings(lr=2e-3, target_params=2000, group_cost={"head": 1})
ITERATIONS = 30
QUANTA = rounded(head=1, ffn=2, stem=2, vocab=8)


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW with FusedAdam's documented interface: `step` in the parameter group, moments per parameter."""

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable=False):
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


@contextlib.contextmanager
def adam_of_megatron_core(adam):
    """megatron-core chooses its Adam when it is imported; here it is as if it had found `adam`. None: torch's AdamW."""
    chosen = torch.optim.AdamW if adam is None else adam
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_optimizer, "Adam", chosen)
        patch.setattr(distrib_optimizer, "Adam", chosen)
        patch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", adam is None)
        yield


def run_with(rank, world_size, adam, case, settings=SETTINGS):
    with adam_of_megatron_core(adam):
        weights = random_llama_weights(CONFIG, seed=3)
        return run_case(rank, world_size, case, CONFIG, weights, settings, ITERATIONS, 2, 2, 12)


def same_run(one, other, rel):
    assert [r["gone"] for r in one.removals] == [r["gone"] for r in other.removals]
    assert one.losses == pytest.approx(other.losses, rel=rel)
    assert one.grad_norms == pytest.approx(other.grad_norms, rel=20 * rel)


@pytest.mark.parametrize(
    "case",
    [Case(tp=2, quanta=QUANTA), Case(dp=2, distributed_optimizer=True, quanta=QUANTA)],
    ids=lambda case: case.name,
)
def test_step_per_group_gives_the_same_run(case):
    by_group, by_state = (
        run_ranks(run_with, case.world_size, adam, case, timeout=110)[0] for adam in (GroupStepAdam, None)
    )
    assert by_group.compactions >= 2, "no state was moved: the run shows nothing"
    same_run(by_group, by_state, rel=1e-5)


def test_step_per_group_begins_anew_after_a_removal_too():
    case = Case(dp=2, distributed_optimizer=True, quanta=QUANTA)
    reset = dataclasses.replace(SETTINGS, ratio=(2, 3), optimizer_state="reset", eps=1e-3)
    by_group, by_state = (
        run_ranks(run_with, case.world_size, adam, case, reset, timeout=110)[0] for adam in (GroupStepAdam, None)
    )
    assert by_group.compactions >= 2 and len(by_group.removals) >= 10
    same_run(by_group, by_state, rel=1e-5)


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("module", ["transformer_engine.pytorch.optimizers", "apex.optimizers"])
def test_fused_adam_gives_the_same_run(module, distributed_optimizer):
    if not torch.cuda.is_available():
        pytest.skip("FusedAdam needs a CUDA device")
    try:
        fused_adam = importlib.import_module(module).FusedAdam
    except (ImportError, AttributeError) as reason:
        pytest.skip(f"no FusedAdam in {module}: {reason}")
    case = Case(distributed_optimizer=distributed_optimizer, quanta=QUANTA, device="cuda")
    fused, plain = (run_with(0, 1, adam, case) for adam in (fused_adam, None))
    assert fused.compactions >= 2
    same_run(fused, plain, rel=1e-4)
