"""Pruned models as stock Megatron checkpoints: megatron-core's own classes load, compute and train them as ours do."""

import argparse
import contextlib
import dataclasses
import io
import os

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.checkpoint.save import save_checkpoint, save_weights
from megatron_prune.checkpoint.to_megatron import arguments_for
from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import KV_HEAD
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.sources import RandomWeights
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import SEQ, STATE, Kind, build, mesh_of, train
from tests.checkpoint.stock_models import GPT_INTEROP, gpt_model, hybrid_model, train_step, wrapped
from tests.optimizer.test_fused_adam import GroupStepAdam, adam_of_megatron_core

TIED = LlamaShape(3, 24, 20, 8, 4, 4, 64, 64, rotary_base=5000.0, tie_word_embeddings=True)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False, add_qkv_bias=True, qk_layernorm=True, model_type="qwen3")
STEPS, LR = 10, 3e-3


def groups_of(shape, heads=((0, 1, 4, 5),) * 3):
    """Query heads given by layer (two whole clusters), four FFN channels per layer, three stem channels."""
    ffn = tuple((layer, 5, 9, 11 + layer) for layer in range(shape.num_layers))
    return Group.of("head", heads), Group.of("ffn", ffn), Group.of("stem", ((2, 3, 17),))


def pruned(shape, *heads):
    """Without the groups."""
    whole = Architecture.full(shape)
    for group in groups_of(shape, *heads):
        whole = whole.without(group)
    return whole


def save_pruned(rank, world, folder, architecture):
    """A checkpoint of ours: the random source's live weights."""
    weights, table = RandomWeights(architecture.shape, seed=3, std=0.2), architecture.table

    def live(name):
        part, layer = table.parts[name]
        tensor = weights(name)
        for dim, of in enumerate(part.dims):
            ids = architecture.ids(of.kind, layer)[:, None] * of.size + np.arange(of.size)
            tensor = tensor.index_select(dim, torch.from_numpy(ids.reshape(-1)).long())
        return tensor

    save_weights(mesh_of(Kind()), folder, 3, architecture, live, torch.float32, {"tokenizer_model": "some.model"})


def train_and_save(rank, world, folder, shape, dtype):
    """A run that prunes between its steps, with Adam."""
    model = build(Kind(bf16=dtype == "bfloat16"), shape)
    for step, group in enumerate(groups_of(shape)):
        train(model, step)
        model.synchronise()
        model.retire(group)
    train(model, 3)
    config = f"optimizer: {{lr: {LR}, min_lr: 0.0001, weight_decay: 0.1, adam_beta2: 0.95}}\n"
    save_checkpoint(model, folder, 4, STATE | {"config": config, "history": []})


def export_it(rank, world, load, save, more):
    from megatron_prune.commands import convert_to_megatron

    torch.distributed.destroy_process_group()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[variable]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = convert_to_megatron.main(["--load", load, "--save", save, *more])
    return status, out.getvalue(), err.getvalue()


def batch(step):
    tokens = torch.randint(0, TIED.vocab_size, (2, SEQ + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], torch.arange(SEQ).unsqueeze(0).expand(2, -1), tokens[:, 1:]


MASK = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)


def gathered(logits, vocab):
    shards = [torch.empty_like(logits) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shards, logits.detach().contiguous())
    return torch.cat(shards, dim=-1)[..., :vocab]


def steps_of(ddp, optimizer, step, mask):
    """Losses of ten steps."""
    losses = []
    for number in range(STEPS):
        tokens, positions, labels = batch(number % 2)
        losses.append(train_step(ddp, optimizer, step, tokens, positions, mask, labels))
    return losses


def stock(rank, world, folder, shape, model_class):
    """Logits of megatron-core's own model with the exported weights, and its losses while it trains with its own DDP
    and Adam."""
    from megatron.core import dist_checkpointing

    mesh_of(Kind(tp=world))
    model = gpt_model(shape) if model_class == "gpt" else hybrid_model(shape)
    state = model.sharded_state_dict()
    if model_class == "hybrid":
        from megatron.core.dist_checkpointing import gpt_checkpoint_interop as interop

        maps = interop.gpt_compatible_layer_maps(model.hybrid_layer_pattern)
        interop.retarget_sharded_state_dict_to_gpt_checkpoint(state, maps)
    loaded = dist_checkpointing.load(state, folder)
    common = dist_checkpointing.load_common_state_dict(folder)
    model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
    tokens, positions, _ = batch(100)
    with torch.no_grad():
        logits = gathered(model(tokens, positions, MASK), shape.vocab_size)
    ddp, optimizer = wrapped(model, LR)
    return logits, steps_of(ddp, optimizer, optimizer.step, MASK), common["args"], common["iteration"]


def with_adam(rank, world, folder, shape, tp, bf16, takes_it):
    """Losses of megatron-core's own model, from exported weights and (`takes_it`) Adam, loaded as Megatron-LM does."""
    from megatron.core.optimizer import distrib_optimizer

    mesh_of(Kind(tp=tp))
    model = gpt_model(shape, bf16)
    with pytest.MonkeyPatch.context() as patch, adam_of_megatron_core(GroupStepAdam):
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)  # with torch's own Adam it does not load this form
        patch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
        ddp, optimizer = wrapped(model, LR, distributed=True, min_lr=1e-4)
        return _losses_with(ddp, optimizer, folder, takes_it)


def _losses_with(ddp, optimizer, folder, takes_it):
    from megatron.core import dist_checkpointing
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    metadata = dist_checkpointing.load_content_metadata(folder)
    model = getattr(ddp.module, "module", ddp.module)
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    if takes_it:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, folder)
    model.load_state_dict(loaded["model"])
    optimizer.reload_model_params()
    rules = {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": True}
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 9, "wd_incr_style": "constant"}
    schedule = OptimizerParamScheduler(optimizer, 0.0, LR, 1e-4, 0, 9, "constant", **decay, **rules)
    if takes_it:
        optimizer.load_state_dict(loaded["optimizer"])
        schedule.load_state_dict(loaded["opt_param_scheduler"])
    return steps_of(ddp, optimizer, optimizer.step, MASK)


def ours(rank, world, folder, shape, tp=None, bf16=False):
    """The same of our model, from our own checkpoint."""
    model = build(Kind(tp=tp or world, bf16=bf16), shape, RunRecord.read(folder))
    load_checkpoint(model, folder)
    if tp:  # as a schedule sets it
        for group in model.optimizer.param_groups:
            group["weight_decay"] *= group["wd_mult"]
    tokens, positions, _ = batch(100)
    with torch.no_grad():
        logits = gathered(model.module(tokens, positions, None), shape.vocab_size)
    return logits, steps_of(model.ddp, model.optimizer, model.step, None)


CLASSES = ["gpt", *(["hybrid"] if GPT_INTEROP else [])]


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def exported(request, tmp_path_factory):
    """(folder of ours, folder of Megatron's, architecture) of a pruned model."""
    folder, architecture = tmp_path_factory.mktemp("export"), pruned(request.param)
    run_ranks(save_pruned, 1, str(folder / "ours"), architecture)
    words = ["--make-vocab-size-divisible-by", "32", "--tensor-model-parallel-size", "2"]
    ((status, out, err),) = run_ranks(export_it, 1, str(folder / "ours"), str(folder / "megatron"), words)
    assert status == 0, err
    assert "hidden 21, FFN 16, 4 heads, 2 KV heads (native)" in out and "evenly: 1, 2\n" in out
    return folder / "ours", folder / "megatron", architecture


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("tp", [1, 2])
def test_stock_classes_load_it_and_train_as_ours_do(exported, tp, model_class):
    folder, megatron, architecture = exported
    source = architecture.shape
    shape = dataclasses.replace(source, hidden_size=21, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2)
    logits, losses, stored, iteration = run_ranks(stock, tp, str(megatron / "iter_0000003"), shape, model_class)[0]
    expected, trained = run_ranks(ours, tp, str(folder), source)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert losses == pytest.approx(trained, rel=1e-5)
    assert iteration == 3 and isinstance(stored, argparse.Namespace)
    assert (stored.num_query_groups, stored.padded_vocab_size, stored.tokenizer_model) == (2, 64, "some.model")


@pytest.mark.parametrize(("dtype", "tp"), [("float32", 1), ("float32", 2), ("bfloat16", 1)])
def test_adam_goes_on_in_the_stock_distributed_optimizer(tmp_path, dtype, tp):
    """On two ranks: tensor-parallel ones, or two that share out the optimizer. Without its state, losses differ."""
    load, save, bf16 = str(tmp_path / "ours"), str(tmp_path / "megatron"), dtype == "bfloat16"
    run_ranks(train_and_save, 1, load, UNTIED, dtype)
    words = ["--make-vocab-size-divisible-by", "32", "--optimizer-state"]
    ((status, out, err),) = run_ranks(export_it, 1, load, save, words)
    assert status == 0, err
    assert f"Adam after 4 steps; Megatron-LM goes on with it given --lr {LR} --min-lr 0.0001 --use-dist" in out
    shape = dataclasses.replace(UNTIED, hidden_size=21, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2)
    folder = f"{save}/iter_0000004"
    expected = run_ranks(ours, 2, load, UNTIED, tp, bf16)[0][1]
    tolerance = 3e-3 if bf16 else 1e-5
    assert run_ranks(with_adam, 2, folder, shape, tp, bf16, True)[0] == pytest.approx(expected, rel=tolerance)
    without = run_ranks(with_adam, 2, folder, shape, tp, bf16, False)[0]
    assert max(abs(a / b - 1) for a, b in zip(without, expected)) > 5 * tolerance


def test_adam_is_not_made_up(tmp_path):
    status, _, err = exports(tmp_path, pruned(TIED), "--optimizer-state")
    assert status == 2 and err.count("\n") == 1 and "iter_0000003 holds weights alone" in err
    assert not (tmp_path / "megatron").exists()


def test_it_comes_back_as_it_was(exported, tmp_path):
    _, megatron, architecture = exported
    back = MegatronCheckpoint(megatron, ShapeOptions())
    back.check(list(architecture.table.parts))
    shape = dataclasses.replace(
        architecture.shape, hidden_size=21, ffn_hidden_size=16, num_attention_heads=4, num_query_groups=2
    )
    assert back.shape == shape and back.iteration == 3


def exports(folder, architecture, *more):
    run_ranks(save_pruned, 1, str(folder / "ours"), architecture)
    return run_ranks(export_it, 1, str(folder / "ours"), str(folder / "megatron"), list(more))[0]


def test_ranks_that_cannot_share_it_are_told_what_to_prune_to(tmp_path):
    status, _, err = exports(tmp_path, pruned(TIED), "--tensor-model-parallel-size", "4")
    assert status == 2 and err.count("\n") == 1
    assert "2 KV heads do not divide by 4; a run with --prune-groups head.round_to=8 ends where they do" in err
    assert not (tmp_path / "megatron").exists()


def test_uneven_clusters_are_expanded_or_refused(tmp_path):
    architecture = pruned(TIED, ((0, 2), (0, 1), (4, 7)))
    status, _, err = exports(tmp_path, architecture, "--kv-policy", "native")
    assert status == 2 and "different numbers of KV heads" in err
    words = [str(tmp_path / "ours"), str(tmp_path / "megatron"), ["--make-vocab-size-divisible-by", "64"]]
    ((status, out, err),) = run_ranks(export_it, 1, *words)
    assert status == 0 and "6 heads, 6 KV heads (expand)" in out, err
    shape = dataclasses.replace(TIED, hidden_size=21, ffn_hidden_size=16, num_attention_heads=6, num_query_groups=6)
    logits = run_ranks(stock, 1, str(tmp_path / "megatron" / "iter_0000003"), shape, "gpt")[0][0]
    torch.testing.assert_close(logits, run_ranks(ours, 1, str(tmp_path / "ours"), TIED)[0][0], rtol=1e-5, atol=1e-5)
    assert len({len(ids) for ids in architecture.sites(KV_HEAD)}) > 1


def test_a_padded_vocabulary_is_told(tmp_path):
    """Megatron's loss counts the padding's logits, which are 0; ours does not."""
    shape = dataclasses.replace(TIED, vocab_size=61)
    status, out, err = exports(tmp_path, pruned(shape))
    assert status == 0, err
    assert "67 rows of padding take part in Megatron's softmax" in out
    assert MegatronCheckpoint(tmp_path / "megatron", ShapeOptions()).shape.vocab_size == 61


def test_layers_that_differ_are_refused(tmp_path):
    ragged = pruned(TIED).without(Group.of("ffn", ((1,), (), ())))
    status, _, err = exports(tmp_path, ragged)
    assert status == 2 and "layers of a stock model are alike, and these have" in err and "FFN channels 15 to 16" in err


def test_the_arguments_make_megatron_cores_configuration():
    """As Megatron-Bridge makes it: every field that is among the arguments."""
    from megatron.core.transformer import TransformerConfig

    stored = vars(arguments_for(dataclasses.replace(UNTIED, norm_epsilon=1e-6), torch.bfloat16))
    fields = {f.name: stored[f.name] for f in dataclasses.fields(TransformerConfig) if f.name in stored}
    config = TransformerConfig(**{**fields, "cp_comm_type": stored["cp_comm_type"][0], "gated_linear_unit": True})
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (3, 24, 20)
    assert (config.num_query_groups, config.kv_channels, config.layernorm_epsilon) == (4, 4, 1e-6)
    assert config.normalization == "RMSNorm" and config.qk_layernorm and config.add_qkv_bias and config.bf16
    assert not (config.add_bias_linear or config.layernorm_zero_centered_gamma or config.multi_latent_attention)


def test_rotary_scaling_is_megatrons_or_refused():
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known = dataclasses.replace(TIED, rope_scaling={**llama3, "original_max_position_embeddings": 8192})
    stored = arguments_for(known, torch.float32)
    assert stored.use_rope_scaling and stored.rope_scaling_factor == 8.0
    other = dataclasses.replace(TIED, rope_scaling={**llama3, "original_max_position_embeddings": 4096})
    with pytest.raises(UserError, match="and this model's 1.0, 4.0, 4096"):
        arguments_for(other, torch.float32)
    linear = dataclasses.replace(TIED, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert arguments_for(linear, torch.float32).rotary_seq_len_interpolation_factor == 2.0
