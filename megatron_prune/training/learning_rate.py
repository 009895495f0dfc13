"""Learning rates: one schedule until the target is reached, another for the small model, or (`lr_schedule: whole_run`)
one for both; all are megatron-core's.

Steps are iterations since the schedule began, so a resumed run needs nothing but its phase to go on.
"""

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_prune.checkpoint.record import CONTINUED
from megatron_prune.config import Config
from megatron_prune.resharding.live import LiveModel
from megatron_prune.training.state import RunState


def build_scheduler(config: Config, model: LiveModel, state: RunState) -> OptimizerParamScheduler:
    """The scheduler of the current phase, at the current iteration, acting on the model's optimizer."""
    optimizer, continued = config.optimizer, config.continued
    in_tail = state.phase == CONTINUED and not config.is_one_schedule
    peak = (continued.continue_lr or optimizer.lr) if in_tail else optimizer.lr
    floor = continued.continue_min_lr if in_tail else optimizer.min_lr
    style = continued.continue_lr_decay_style if in_tail else optimizer.lr_decay_style
    warmup = continued.continue_lr_warmup_iters if in_tail else optimizer.lr_warmup_iters
    decay = config.continue_iters if in_tail else (optimizer.lr_decay_iters or config.training.train_iters)
    for group in model.optimizer.param_groups:  # megatron-core reads the peak from the group first
        group["max_lr"], group["min_lr"] = peak, floor
    scheduler = OptimizerParamScheduler(
        model.optimizer,
        init_lr=0.0,
        max_lr=peak,
        min_lr=floor,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(decay, warmup + 1),
        lr_decay_style=style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=max(decay, 1),
        wd_incr_style="constant",
        wsd_decay_steps=optimizer.lr_wsd_decay_iters if not in_tail else None,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
    )
    scheduler.step(state.iteration - (state.phase_start if in_tail else 0))
    return scheduler
