"""The distilled loss of vocab-parallel logits: equal to autograd through whole ones, on any number of ranks."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from megatron_prune.runtime.device import choose_device
from megatron_prune.runtime.mesh import close_mesh, init_mesh
from megatron_prune.testing.helpers.ranks import run_ranks
from megatron_prune.training.distillation import distilled_loss

VOCABULARY, PADDED = 29, 36  # ids, and columns of all ranks together: the last rank's end in empty ones


def logits(seed, scale=3.0):
    return torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def labels():
    return torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(9))


def whole(weight, temperature):
    """(loss, cross entropy, divergence, gradient of the mean loss), in float64, by autograd."""
    student, teacher = logits(0).double().requires_grad_(), logits(1).double()
    entropy = cross_entropy(student.flatten(0, 1), labels().flatten(), reduction="none").view(2, 5)
    log_p, log_q = log_softmax(student / temperature, -1), log_softmax(teacher / temperature, -1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    loss = (1 - weight) * entropy + weight * temperature**2 * divergence
    loss.mean().backward()
    return [value.detach() for value in (loss, entropy, divergence, student.grad)]


def split(_rank, world_size, weight, temperature):
    mesh = init_mesh(choose_device("cpu"), world_size, 1)
    width = PADDED // world_size
    columns = slice(mesh.tp_rank * width, (mesh.tp_rank + 1) * width)
    student, teacher = (
        torch.nn.functional.pad(logits(seed), (0, PADDED - VOCABULARY), value=float("-inf"))[..., columns].contiguous()
        for seed in (0, 1)
    )
    student.requires_grad_()
    loss, entropy, divergence = distilled_loss(student, teacher, labels(), weight, temperature, mesh)
    loss.mean().backward()
    assert not entropy.requires_grad and not divergence.requires_grad
    close_mesh()
    return loss.detach(), entropy, divergence, student.grad


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("weight", "temperature"), [(0.9, 1.0), (0.5, 2.5), (1.0, 1.0), (0.0, 1.0)])
def test_losses_and_gradients_are_those_of_whole_logits(ranks, weight, temperature):
    expected = whole(weight, temperature)
    found = run_ranks(split, ranks, weight, temperature)
    for own in found:
        for mine, theirs in zip(own[:3], expected, strict=False):
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=2e-6)
    gradient = torch.cat([own[3] for own in found], dim=-1)
    torch.testing.assert_close(gradient[..., :VOCABULARY].double(), expected[3], rtol=2e-6, atol=1e-8)
    assert not gradient[..., VOCABULARY:].any(), "columns without an id"
