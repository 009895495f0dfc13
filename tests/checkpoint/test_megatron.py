"""Stock Megatron checkpoints: models of megatron-core, saved by its own dist_checkpointing, come in exactly."""

import argparse
import contextlib
import io
import os
import pickle
import random
import re

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_prune.checkpoint.load import load_checkpoint
from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
from megatron_prune.checkpoint.reader import CheckpointReader
from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.errors import UserError
from megatron_prune.model.shape import LlamaShape
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import SEQ, Kind, build, mesh_of
from tests.checkpoint.stock_models import HAS_HYBRID, gpt_model, hybrid_model, train_step, wrapped

TIED = LlamaShape(2, 24, 20, 6, 3, 4, 61, 64, rotary_base=5000.0, tie_word_embeddings=True)
UNTIED = LlamaShape(3, 16, 12, 4, 4, 8, 50, 64, norm_epsilon=1e-6, add_qkv_bias=True, model_type="qwen2")


def arguments_of(shape):
    """As Megatron-LM stores them."""
    return argparse.Namespace(
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        group_query_attention=shape.num_query_groups < shape.num_attention_heads,
        kv_channels=shape.kv_channels,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        norm_epsilon=shape.norm_epsilon,
        rotary_base=shape.rotary_base,
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        params_dtype=torch.float32,
    )


def as_hybrid(state, first="*"):
    """The state of a GPTModel under the names of a HybridModel of the pattern `*-*-...` (or `-*-*...`)."""
    renamed = {}
    for tensor in state.values():
        if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", tensor.key):
            is_second = ("self_attention" in match[2] or "input_layernorm" in match[2]) == (first == "-")
            tensor.key = f"decoder.layers.{2 * int(match[1]) + is_second}.{match[2]}"
        tensor.key = tensor.key.replace("decoder.final_layernorm.", "decoder.final_norm.")
        renamed[tensor.key] = tensor
    return renamed


def save_stock(rank, world, folder, shape, with_arguments, form="gpt"):
    """What Megatron writes at tensor-parallel size `world`, and the logits of its model.

    `form`: of the arguments, the layers: "gpt", "object" (of 0.19), "layers" (one tensor each), "hybrid", "turned".
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    mesh_of(Kind(tp=world))
    model = gpt_model(shape)
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": form not in ("gpt", "object")})
    if form in ("hybrid", "turned"):
        state = as_hybrid(state, "*" if form == "hybrid" else "-")
    common = {"args": arguments_of(shape), "iteration": 7} if with_arguments else {}
    is_own = hasattr(serialization, "_legacy_common_state_exists")  # 0.19 writes no common.pt by itself
    if form != "gpt" and not is_own:
        state["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    else:
        state |= common
    target = f"{folder}/iter_0000007"
    if rank == 0:
        os.makedirs(target)
    torch.distributed.barrier()
    dist_checkpointing.save(state, target)
    if rank == 0:
        if form != "gpt" and not is_own:
            os.remove(f"{target}/common.pt")
        with open(f"{folder}/latest_checkpointed_iteration.txt", "w") as file:
            file.write("7")
    tokens = torch.randint(0, shape.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    logits = model(tokens, torch.arange(SEQ).unsqueeze(0).expand(2, -1), mask)
    return tokens, gathered(logits, world)[..., : shape.vocab_size]


def save_hybrid(rank, world, folder, shape):
    """A HybridModel after two steps of the distributed optimizer, all of it saved under its own names as Megatron-LM
    does, and its logits."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer.enums import AttnBackend

    mesh = mesh_of(Kind(tp=world))
    model = hybrid_model(shape)
    ddp, optimizer = wrapped(model, distributed=True)
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 9, "wd_incr_style": "constant"}
    schedule = OptimizerParamScheduler(optimizer, 0.0, 3e-3, 0.0, 0, 9, "cosine", **decay)
    tokens = torch.randint(0, shape.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(2))
    positions, mask = torch.arange(SEQ).expand(2, -1), torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    for _ in range(2):
        train_step(ddp, optimizer, optimizer.step, tokens, positions, mask, tokens.roll(-1, 1))
        schedule.step(1)
    named = vars(arguments_of(shape)) | {"layernorm_epsilon": shape.norm_epsilon}  # as newer releases call it
    del named["norm_epsilon"]
    named |= {"num_layers": 2 * shape.num_layers, "hybrid_layer_pattern": "*-" * shape.num_layers}
    named |= {"attention_backend": AttnBackend.auto, "layernorm_zero_centered_gamma": False, "cp_comm_type": ["p2p"]}
    kinds = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}
    state = {"args": argparse.Namespace(**named), "iteration": 7, "checkpoint_version": 3.0}
    state |= {"opt_param_scheduler": schedule.state_dict(), "num_floating_point_operations_so_far": 0.0}
    state["model"] = model.sharded_state_dict(metadata=kinds)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=kinds)
    rng = [{"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()}]
    state["rng_state"] = ShardedObject("rng_state", rng, (1, world), (0, mesh.tp_rank))
    target = f"{folder}/iter_0000007"
    if rank == 0:
        os.makedirs(target)
    torch.distributed.barrier()
    dist_checkpointing.save(state, target, content_metadata=kinds)
    return tokens, gathered(model(tokens, positions, mask), world)[..., : shape.vocab_size]


def gathered(logits, world):
    shards = [torch.empty_like(logits) for _ in range(world)]
    torch.distributed.all_gather(shards, logits.detach().contiguous())
    return torch.cat(shards, dim=-1)


def import_it(rank, world, load, save, more):
    """The tool's exit status and words, in a process of its own."""
    from megatron_prune.commands import convert_from_megatron

    torch.distributed.destroy_process_group()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[variable]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = convert_from_megatron.main(["--load", load, "--save", save, *more])
    return status, out.getvalue(), err.getvalue()


def logits_here(rank, world, save, shape, tokens):
    model = build(Kind(), shape, RunRecord.read(save))
    load_checkpoint(model, save)
    with torch.no_grad():
        logits = model.module(tokens, torch.arange(SEQ).unsqueeze(0), None)
    return logits[..., : shape.vocab_size]


@pytest.mark.parametrize(("shape", "ranks"), [(TIED, 1), (UNTIED, 2)], ids=["tied-gqa-tp1", "untied-bias-tp2"])
@pytest.mark.parametrize("form", ["gpt", "object", "hybrid"])
def test_logits_are_those_of_megatrons_own_model(tmp_path, shape, ranks, form):
    stock, save = str(tmp_path / "stock"), str(tmp_path / "imported")
    tokens, expected = run_ranks(save_stock, ranks, stock, shape, True, form)[0]
    ((status, out, err),) = run_ranks(import_it, 1, stock, save, [])
    assert status == 0, err
    assert "all accounted for" in out
    reader = CheckpointReader(save)
    assert reader.architecture.shape == shape
    (found,) = run_ranks(logits_here, 1, save, shape, tokens)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_HYBRID, reason="this megatron-core has no HybridModel")
@pytest.mark.parametrize(("shape", "ranks"), [(TIED, 1), (UNTIED, 2)], ids=["tied-gqa-tp1", "untied-bias-tp2"])
def test_logits_are_those_of_megatrons_own_hybrid_model(tmp_path, shape, ranks):
    stock, save = str(tmp_path / "stock"), str(tmp_path / "imported")
    tokens, expected = run_ranks(save_hybrid, ranks, stock, shape)[0]
    ((status, out, err),) = run_ranks(import_it, 1, f"{stock}/iter_0000007", save, [])
    assert status == 0 and "all accounted for" in out, err
    assert CheckpointReader(save).architecture.shape == shape
    (found,) = run_ranks(logits_here, 1, save, shape, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_folder_does_not_state_must_be_given(tmp_path):
    stock, save = str(tmp_path / "stock"), str(tmp_path / "imported")
    tokens, expected = run_ranks(save_stock, 1, stock, TIED, False)[0]
    ((status, _, err),) = run_ranks(import_it, 1, stock, save, [])
    assert status == 2 and err.count("\n") == 1 and "does not state num_attention_heads; give --num-attention" in err
    facts = "--num-attention-heads 6 --num-query-groups 3 --kv-channels 4 --vocab-size 61 --max-position-embeddings 64"
    more = [*facts.split(), "--norm-epsilon", "1e-5", "--rotary-base", "5000"]
    ((status, _, err),) = run_ranks(import_it, 1, stock, save, [*more[:2], "--num-query-groups", "2", *more[4:]])
    assert status == 2 and "linear_qkv has 48 rows" in err
    ((status, _, err),) = run_ranks(import_it, 1, stock, save, more)
    assert status == 0, err
    (found,) = run_ranks(logits_here, 1, save, TIED, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_that_megatron_core_0_19_wrote(tmp_path, real_data):
    stock, save = real_data / "megatron_0_19" / "tied_gqa", str(tmp_path / "imported")
    if not stock.is_dir():
        pytest.skip("the real inputs hold no megatron_0_19/tied_gqa")
    ((status, _, err),) = run_ranks(import_it, 1, str(stock), save, [])
    assert status == 0, err
    expected = torch.load(stock / "expected.pt", weights_only=True)
    shape = CheckpointReader(save).architecture.shape
    assert shape == TIED
    (found,) = run_ranks(logits_here, 1, save, shape, expected["tokens"])
    torch.testing.assert_close(found, expected["logits"][..., : shape.vocab_size], rtol=1e-5, atol=1e-5)


def change(folder, **arguments):
    """Other arguments in a folder of the newer format, in a file of their own."""
    from megatron_prune.checkpoint.guarded_reader import load_object, read_metadata

    metadata = read_metadata(folder)
    key = "common_state/shard_0_1"
    (common,) = load_object(folder, metadata, key, [argparse.Namespace])
    vars(common["args"]).update(arguments)
    torch.save([common], folder / "__9_0.distcp")
    place = metadata.storage_data[MetadataIndex(key)]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, (folder / "__9_0.distcp").stat().st_size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_arguments_among_the_tensors_are_checked_and_run_nothing(tmp_path, caplog):
    stock, save, mark = tmp_path / "stock", str(tmp_path / "imported"), tmp_path / "mark"
    run_ranks(save_stock, 1, str(stock), TIED, True, "object")
    folder = stock / "iter_0000007"
    for name, value, said in [
        ("normalization", "LayerNorm", "normalization LayerNorm; only RMSNorm is"),
        ("position_embedding_type", "learned_absolute", "position_embedding_type learned_absolute; only rope is"),
        ("swiglu", False, "swiglu False; only True is"),
        ("window_size", (8, 0), "window_size (8, 0); only a model without it is"),
    ]:
        before = {key: getattr(arguments_of(TIED), key, None) for key in (name,)}
        change(folder, **{name: value})
        with pytest.raises(UserError, match=re.escape(f"was trained with {said} a Llama here")):
            MegatronCheckpoint(stock, ShapeOptions())
        change(folder, **before)
    assert MegatronCheckpoint(stock, ShapeOptions()).shape == TIED
    change(folder, more=Trap(mark))
    with pytest.raises(UserError, match=r"__9_0\.distcp: asks for posix\.mkdir.* not needed when --num-attention"):
        MegatronCheckpoint(stock, ShapeOptions())
    given = ShapeOptions(6, 3, 4, 61, 64, 1e-5, 5000.0)
    assert MegatronCheckpoint(stock, given).shape == TIED
    assert "left unread" in caplog.text and "not checked: position_embedding_type, normalization" in caplog.text
    assert not mark.exists() and not os.path.exists(save)


def test_layers_of_their_own_must_take_turns(tmp_path):
    stock = str(tmp_path / "stock")
    run_ranks(save_stock, 1, stock, TIED, True, "turned")
    with pytest.raises(UserError, match="its layers are not attention and FFN in turn"):
        MegatronCheckpoint(tmp_path / "stock", ShapeOptions())
