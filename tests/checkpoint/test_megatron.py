"""Stock Megatron checkpoints: models of megatron-core, saved by its own dist_checkpointing, come in exactly."""

import argparse
import contextlib
import io
import os
import pickle
import re

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_prune.checkpoint import CheckpointReader, RunRecord, load_checkpoint
from megatron_prune.checkpoint.megatron import MegatronCheckpoint, ShapeOptions
from megatron_prune.errors import UserError
from megatron_prune.model.shape import LlamaShape
from megatron_prune.testing.helpers.ranks import run_ranks
from tests.checkpoint.small_run import Kind, build, mesh_of

TIED = LlamaShape(2, 24, 20, 6, 3, 4, 61, 64, rotary_base=5000.0, tie_word_embeddings=True)
UNTIED = LlamaShape(3, 16, 12, 4, 4, 8, 50, 64, norm_epsilon=1e-6, add_qkv_bias=True, model_type="qwen2")
PADDED, SEQ = 64, 16


def gpt_model(shape):
    """megatron-core's own model, with its own layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        init_method_std=0.2,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_layernorm),
        vocab_size=PADDED,
        max_sequence_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases of 1 and 0 would hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


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
    shards = [torch.empty_like(logits) for _ in range(world)]
    torch.distributed.all_gather(shards, logits.detach().contiguous())
    return tokens, torch.cat(shards, dim=-1)[..., : shape.vocab_size]


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
