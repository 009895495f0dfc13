"""The oracle's training: equal to torch's AdamW and clipping; a cut changes nothing else; scores are what they say."""

import itertools

import pytest
import torch

from megatron_prune.testing.helpers.tiny_models import random_batch, random_llama_weights, tiny_config
from megatron_prune.testing.reference import oracle_model
from megatron_prune.testing.reference.oracle import DenseOracle, OracleSettings
from megatron_prune.testing.reference.oracle_geometry import output_projections

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def rate(step):
    return 2e-3 * (1 + step) / 4


def make(settings=None, seed=0, dtype=torch.float32, **overrides):
    config = tiny_config(**overrides)
    return DenseOracle(config, random_llama_weights(config, seed), settings, dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("clip_grad", [0.3, 0.0])
def test_training_equals_transformers_with_torch_adamw(tied, clip_grad):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_config(num_key_value_heads=2, tie_word_embeddings=tied)
    weights = random_llama_weights(config)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(weights, strict=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    oracle = DenseOracle(config, weights, OracleSettings(lr=rate, weight_decay=0.1, clip_grad=clip_grad))
    for step in range(5):
        batch = random_batch(config, seed=step, micro_batches=3)
        optimizer.zero_grad()
        losses = []
        for tokens, labels in batch:
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            (loss / 3).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or float("inf")).item()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        result = oracle.train_step(batch)
        assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-4)
        assert result.removed == []
    assert oracle.iteration == 5
    trained = dict(model.named_parameters())
    for name, weight in oracle.weights.items():
        torch.testing.assert_close(weight, trained[name].detach(), atol=2e-5, rtol=1e-4)


def test_training_makes_the_loss_fall_and_repeats_exactly():
    runs = [make(OracleSettings(lr=5e-3)) for _ in range(2)]
    batch = random_batch(tiny_config(), seed=0)
    losses = [[run.train_step(batch).loss for _ in range(8)] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


def test_a_cut_keeps_weights_and_moments_of_the_survivors():
    oracle = make(OracleSettings(lr=5e-3))
    oracle.train_step(random_batch(tiny_config(), seed=0))
    before = {name: (oracle.weights[name], oracle.exp_avg[name], oracle.exp_avg_sq[name]) for name in oracle.weights}
    oracle.remove("ffn", ((7,), (0,), (1,), (2,)))
    oracle.remove("head", ((0,), (2,), (0,), (0,)))
    oracle.remove("stem", ((31,),))
    after = {name: (oracle.weights[name], oracle.exp_avg[name], oracle.exp_avg_sq[name]) for name in oracle.weights}
    channels = [c for c in range(48) if c != 0]
    columns = [c for c in range(32) if not 16 <= c < 24]
    for old, new in zip(before[DOWN], after[DOWN], strict=True):
        assert torch.equal(new, old[:31][:, channels])
    for old, new in zip(before[O_PROJ], after[O_PROJ], strict=True):
        assert torch.equal(new, old[:31][:, columns])
    embedding = "model.embed_tokens.weight"
    for old, new in zip(before[embedding], after[embedding], strict=True):
        assert torch.equal(new, old[:, :31])
    assert oracle.iteration == 1


def test_after_a_cut_training_goes_on_like_the_unpruned_model_with_empty_slots():
    """Zero weights and zero moments are a fixed point of training for an FFN channel and for a whole KV group."""
    settings = OracleSettings(lr=5e-3, weight_decay=0.1)
    small = make(settings, num_key_value_heads=2, dtype=torch.float64)
    slots = make(settings, num_key_value_heads=2, dtype=torch.float64)
    batches = [random_batch(tiny_config(), seed=seed) for seed in range(6)]
    for batch in batches[:2]:
        small.train_step(batch)
        slots.train_step(batch)
    small.remove("ffn", ((7,), (0,), (1,), (2,)))
    small.remove("head", ((0, 1),) * 4)
    for layer, channel in enumerate((7, 0, 1, 2)):
        prefix = f"model.layers.{layer}."
        for tensors in (slots.weights, slots.exp_avg, slots.exp_avg_sq):
            for name in ("gate_proj", "up_proj"):
                tensors[f"{prefix}mlp.{name}.weight"][channel] = 0
            tensors[f"{prefix}mlp.down_proj.weight"][:, channel] = 0
            for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
                tensors[f"{prefix}self_attn.{name}.weight"][:rows] = 0
            tensors[f"{prefix}self_attn.o_proj.weight"][:, :16] = 0
    for batch in batches[2:]:
        result, expected = small.train_step(batch), slots.train_step(batch)
        assert result.loss == pytest.approx(expected.loss, rel=1e-10)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-10)


def loss_in_float64(oracle, batch):
    return sum(oracle.loss(tokens, labels) for tokens, labels in batch) / len(batch)


def test_the_first_order_term_has_the_sign_of_a_finite_difference():
    """Shrinking a head's columns of W_o by 1e-4 changes the loss by -1e-4 x sum(w g)."""
    oracle = make(dtype=torch.float64)
    batch = random_batch(tiny_config(), seed=0, micro_batches=1)
    _, gradient, _ = oracle.gradients(batch)
    base = loss_in_float64(oracle, batch)
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        kept = oracle.weights[O_PROJ].clone()
        predicted = -1e-4 * (kept[:, columns] * gradient[O_PROJ][:, columns]).sum().item()
        oracle.weights[O_PROJ][:, columns] *= 1 - 1e-4
        change = loss_in_float64(oracle, batch) - base
        oracle.weights[O_PROJ].copy_(kept)
        assert change == pytest.approx(predicted, rel=2e-2, abs=1e-9)


def test_mix_predicts_the_loss_change_of_removing_an_element():
    """With the true second derivative in F's place, S of mix is |change of the loss| up to third order; the opposite
    sign of the second-order term is further off."""
    oracle = make(dtype=torch.float64)
    batch = random_batch(tiny_config(), seed=0, micro_batches=1)
    base, gradient, _ = oracle.gradients(batch)
    errors = {"mix": 0.0, "wrong_sign": 0.0}
    for row, column in itertools.product(range(0, 32, 8), range(0, 48, 8)):
        w, g = oracle.weights[DOWN][row, column].item(), gradient[DOWN][row, column].item()
        losses = []
        for value in (w + 1e-2, w - 1e-2, 0.0):
            oracle.weights[DOWN][row, column] = value
            losses.append(loss_in_float64(oracle, batch))
        oracle.weights[DOWN][row, column] = w
        curvature = (losses[0] + losses[1] - 2 * base) / 1e-4
        change = losses[2] - base
        errors["mix"] += abs(abs(w * g - w * w * curvature / 2) - abs(change))
        errors["wrong_sign"] += abs(abs(w * g + w * w * curvature / 2) - abs(change))
    assert errors["mix"] < 0.2 * errors["wrong_sign"]


def brute_force_gradient(oracle, tokens, labels, name):
    leaves = {key: weight.detach().clone().requires_grad_() for key, weight in oracle.weights.items()}
    logits = oracle_model.logits(tokens, leaves, oracle.geometry, oracle.live)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return torch.autograd.grad(loss, leaves[name])[0]


@pytest.mark.parametrize(
    ("fisher", "unit", "scale"), [("microbatch", "sequence", 2), ("microbatch", "token", 32), ("batch", "sequence", 0)]
)
def test_criteria_and_fisher_equal_their_formulas(fisher, unit, scale):
    batch = random_batch(tiny_config(), seed=4, micro_batches=3, micro_batch_size=2, seq_length=16)
    oracle = make(dtype=torch.float64)
    w = oracle.weights[DOWN]
    own = [brute_force_gradient(oracle, tokens, labels, DOWN) for tokens, labels in batch]
    g = sum(own) / 3
    F = scale * sum(x**2 for x in own) / 3 if fisher == "microbatch" else g**2
    expected = {
        "taylor_first": (w * g).abs(),
        "taylor_second": (w**2 * F).abs(),
        "taylor_mix": (w * g - w**2 * F / 2).abs(),
        "obd": (w**2 * F / 2).abs(),
        "magnitude": w.abs(),
    }
    for criterion, S in expected.items():
        settings = OracleSettings(criterion=criterion, fisher=fisher, fisher_unit=unit)
        scorer = make(settings, dtype=torch.float64)
        _, gradient, squares = scorer.gradients(batch)
        scores = scorer.element_scores(gradient, squares)
        assert list(scores) == output_projections(scorer.live)
        torch.testing.assert_close(scores[DOWN], S, rtol=1e-9, atol=0)
    units = scorer.unit_scores(batch)  # magnitude: the sums can be read off the weights
    attention = scorer.weights[O_PROJ].abs()
    assert units.head[1][2] == pytest.approx(attention[:, 16:24].sum().item())
    assert units.ffn[1][5] == pytest.approx(w[:, 5].abs().sum().item())
    rows = sum(scorer.weights[name][9].abs().sum().item() for name in output_projections(scorer.live))
    assert units.stem[9] == pytest.approx(rows)


def test_adam_fisher_is_exp_avg_sq_before_the_step():
    settings = OracleSettings(lr=5e-3, criterion="taylor_second", fisher="adam")
    oracle = make(settings)
    batch = random_batch(tiny_config(), seed=0)
    assert set(oracle.unit_scores(batch).stem.values()) == {0.0}
    oracle.train_step(batch)
    _, gradient, squares = oracle.gradients(batch)
    scores = oracle.element_scores(gradient, squares)[O_PROJ]
    torch.testing.assert_close(scores, oracle.weights[O_PROJ].square() * oracle.exp_avg_sq[O_PROJ])


def test_a_loss_that_is_not_finite_is_an_error():
    oracle = make()
    oracle.weights["model.norm.weight"][0] = float("nan")
    with pytest.raises(FloatingPointError, match="iteration 1"):
        oracle.train_step(random_batch(tiny_config(), seed=0))
