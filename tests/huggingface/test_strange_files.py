"""Files of a model that are not what they should be: mutated JSON, absurd sizes, values that are not finite, leftovers.

Whatever a JSON file says, it is read or refused in one line: no traceback, no allocation beyond reason.
"""

import json
import math
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface import cluster
from megatron_prune.huggingface.cluster import read_architecture
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.llama import inverse_frequencies
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.commands import torchrun
from tests.strange import ANYTHING, is_read_or_refused, mutated, places

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OPTIONAL = (
    *("rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "layer_types"),
    *("sliding_window", "use_sliding_window", "mlp_bias", "attention_bias", "head_dim", "quantization_config", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_experts", "torch_dtype", "tie_word_embeddings"),
)


def pruned_config():
    from megatron_prune.huggingface.config import shape_from_config

    architecture = Architecture.full(shape_from_config(tiny_config()))
    layers = architecture.shape.num_layers
    return cluster.config_json(architecture.without(Group.of("head", ((0,),) * layers)), "float32")


CONFIGS = {
    "llama": tiny_config(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 16}),
    "cluster": pruned_config(),
}


@pytest.mark.parametrize("kind", CONFIGS)
@given(data=st.data())
def test_a_mutated_config_is_read_or_refused_in_one_line(tmp_path_factory, kind, data):
    config = CONFIGS[kind]
    where = data.draw(st.sampled_from([*places(config), *((name,) for name in OPTIONAL)]))
    folder = tmp_path_factory.getbasetemp() / f"mutated-{kind}"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(mutated(config, where, data.draw(ANYTHING))))
    is_read_or_refused(lambda: read_architecture(folder))
    is_read_or_refused(lambda: read_source(folder))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    config = tiny_config()
    write_hf_folder(folder, config, random_llama_weights(config, 0))
    names = list(FolderWeights(folder).stored)
    (file,) = folder.glob("*.safetensors")
    file.rename(folder / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, index


@given(data=st.data())
def test_a_mutated_index_is_read_or_refused_in_one_line(sharded, data):
    folder, index = sharded
    where = data.draw(st.sampled_from(list(places(index))))
    (folder / "model.safetensors.index.json").write_text(json.dumps(mutated(index, where, data.draw(ANYTHING))))
    is_read_or_refused(lambda: FolderWeights(folder).check(read_architecture(folder)))


@pytest.mark.parametrize("size", [1 << 31, 1 << 63, 10**400], ids=["2^31", "2^63", "10^400"])
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_absurd_sizes_are_refused_before_anything_is_made(field, size, tmp_path):
    more = {"num_key_value_heads": size} if field == "num_attention_heads" else {}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**{field: size}, **more)))
    with pytest.raises(UserError, match=f"{field}: .*beyond all models"):
        read_architecture(tmp_path)


def test_deep_json_and_escape_sequences_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_shape(tmp_path)
    with pytest.raises(UserError) as raised:
        read_shape(tmp_path / "a\x1b[31m\nb")
    assert "a\\x1b[31m\\nb" in str(raised.value)


# Values --------------------------------------------------------------------------------------------------------------


def model(folder, **more):
    config = tiny_config(**more)
    write_hf_folder(folder, config, random_llama_weights(config, 0))
    return folder


def poison(folder, name, value):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tool", ["convert_from_hf", "convert_to_gguf"])
def test_values_that_are_not_finite_do_not_come_in(tool, value, tmp_path, capsys, stories260k):
    from megatron_prune.commands import convert_from_hf, convert_to_gguf

    folder = tmp_path / "model"
    shutil.copytree(stories260k, folder)
    name = "model.layers.1.mlp.up_proj.weight"
    poison(folder, name, value)
    tool, save = {"convert_from_hf": (convert_from_hf, "run"), "convert_to_gguf": (convert_to_gguf, "m.gguf")}[tool]
    assert tool.main(["--hf-model", str(folder), "--save", str(tmp_path / save)]) == 2
    error = capsys.readouterr().err
    assert name in error and "1 of " in error and "NaN or infinite" in error and error.count("\n") == 1
    assert not (tmp_path / "m.gguf").exists() and not list(tmp_path.glob("run/iter_*"))


def test_float16_on_the_way_in_does_not_overflow(tmp_path, capsys):
    from megatron_prune.commands import convert_from_hf

    folder = model(tmp_path / "model")
    poison(folder, "model.norm.weight", 1e6)
    words = ["--hf-model", str(folder), "--save", str(tmp_path / "run"), "--dtype"]
    assert convert_from_hf.main([*words, "float16"]) == 2
    assert "model.norm.weight as torch.float16: 1 of" in capsys.readouterr().err
    assert convert_from_hf.main([*words, "bfloat16"]) == 0


# What stands in the place of a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_index_may_list_the_head_of_a_tied_model(is_tied, tmp_path):
    folder = model(tmp_path / "model", tie_word_embeddings=is_tied)
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    file.unlink()
    listed = dict.fromkeys([*tensors, "lm_head.weight"], "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    weights = FolderWeights(folder)
    if is_tied:
        weights.check(read_shape(folder))
    else:
        with pytest.raises(UserError, match=r"missing: lm_head.weight"):
            weights.check(read_shape(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_pointers_of_git_lfs_are_called_that(name, tmp_path):
    folder = model(tmp_path / "model")
    if name.startswith("pytorch"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS") as raised:
        FolderWeights(folder).check(read_shape(folder))
    assert "git lfs pull" in str(raised.value)


def test_adapters_hub_ids_and_caches_get_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    for folder, hint in (("lora", "merge it"), ("models--a--b", "in snapshots"), ("a/model-1.7B", "a hub's id")):
        for read in (read_shape, FolderWeights):
            with pytest.raises(UserError, match=hint):
                read(folder)
    with pytest.raises(UserError, match="name the folder of a Hugging Face model"):
        read_shape(tmp_path / "absent")


def test_a_snapshot_in_a_hubs_cache_has_the_models_name(tmp_path):
    folder = model(tmp_path / "models--org--Small-1.7B" / "snapshots" / ("0123abcd" * 5))
    assert read_source(folder)["name"] == "Small-1.7B"
    os.symlink(folder, tmp_path / "mine")
    assert read_source(tmp_path / "mine")["name"] == "Small-1.7B"


INSIDE, BESIDE = {"original_max_position_embeddings": 64}, {"original_max_position_embeddings": 32}


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("inside", [{}, INSIDE], ids=["", "inside"])
@pytest.mark.parametrize("beside", [{}, BESIDE], ids=["", "beside"])
def test_the_original_context_is_where_transformers_finds_it(field, inside, beside, tmp_path):
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5 and (field, inside, beside) != ("rope_scaling", INSIDE, {}):
        pytest.skip("transformers 4 looks inside rope_scaling only")
    # Heads of 64 channels, so that there are wavelengths on either side of the original context.
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    rope = {"rope_theta": 10000.0, field: LLAMA3 | inside, "max_position_embeddings": 256} | beside
    folder = model(tmp_path / "model", **{k: v for k, v in (tiny_config() | sizes | rope).items() if v is not None})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | beside))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours = inverse_frequencies(read_shape(folder))
    torch.testing.assert_close(ours, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


def test_training_refuses_them_on_all_ranks_where_only_one_reads_them(tmp_path):
    tiny = prepare(tmp_path / "files")
    poison(tiny.source, "model.norm.weight", math.nan)  # of the last pipeline stage
    said = torchrun(2, *tiny.arguments(tmp_path / "run", "--pipeline-model-parallel-size", 2), ok=False)
    assert said.count("model.norm.weight: 1 of") == 1 and "NaN or infinite" in said, said
    assert not list(tmp_path.glob("run/iter_*"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_pointers_of_git_lfs_among_a_tokenizers_files_are_called_that(name, tmp_path):
    if name == "tokenizer_config.json":
        (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=f"{name}: is a pointer of Git LFS"):
        build_tokenizer(None, str(tmp_path))
