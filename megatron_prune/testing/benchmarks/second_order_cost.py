"""What the second-order update costs, piece by piece, on a `SteppedRun`."""

from megatron_prune.pruning.groups import default_names
from megatron_prune.pruning.second_order import SecondOrderUpdate
from megatron_prune.saliency.inputs import InputNeeds, InputWatcher
from megatron_prune.testing.helpers.meters import Seconds
from megatron_prune.testing.helpers.stepped_run import SteppedRun, Timer
from megatron_prune.training.pruning_settings import collector_settings

FORWARD, KEEPING = "forward and backward", "forward and backward that keep inputs"


def time_second_order(run: SteppedRun, timer: Timer) -> dict[str, Seconds]:
    """Time by name: `FORWARD`, `KEEPING`, and the update before a group of each kind (`head`, `ffn`, `stem`).

    The inputs are of as many micro-batches as the configuration's calibration tokens make. Groups are chosen at random
    and leave, as in training.
    """
    settings = collector_settings(run.config, run.mesh.dp_size)
    spent = {FORWARD: timer(run.forward_backward)[1]}
    watcher = InputWatcher(run.model, InputNeeds(kept=settings.kept_microbatches, keep_stem=True))
    watcher.arm()
    spent[KEEPING] = timer(run.forward_backward)[1]
    kept = watcher.finish().kept
    assert kept is not None
    update = SecondOrderUpdate(run.model, kept, settings.damping)
    for kind in default_names():
        group = run.group(kind)
        _, spent[kind] = timer(lambda: update.compensate(group))  # noqa: B023 - called at once
        run.coordinator.commit(group)
    return spent
