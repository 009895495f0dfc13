"""What a run refuses before it builds or writes anything: each mistake is one line that names the field or file."""

import dataclasses

import pytest

from megatron_prune.config import Config, GroupConfig, GroupConfigs, ModelConfig, PruningConfig, validate
from megatron_prune.errors import UserError
from megatron_prune.launch.assembly.opening import open_inputs
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder


def configured(folder, **changes):
    """A working configuration over the workshop, with whole sections replaced by `changes`."""
    base = Config()
    config = dataclasses.replace(
        base,
        model=ModelConfig(hf_model=str(folder / "source")),
        data=dataclasses.replace(
            base.data,
            data_path=str(folder / "data"),
            tokenizer_model=str(folder / "tokenizer.model"),
            seq_length=32,
        ),
        pruning=PruningConfig(target_params=20000),
    )
    return dataclasses.replace(config, **changes)


def test_what_fits_is_opened(workshop):
    inputs = open_inputs(configured(workshop))
    assert inputs.architecture.hidden_size == 32 and not inputs.resumes
    assert inputs.read("model.norm.weight").shape == (32,)


def floor(name, units):
    return GroupConfigs({name: GroupConfig(floor=units)})


@pytest.mark.parametrize(
    ("pruning", "words"),
    [
        (PruningConfig(target_params=10**9), "not below the source's"),
        (PruningConfig(target_params=50), "cannot be reached"),
        (PruningConfig(target_params=20000, types=("head",)), "cannot be reached"),
        (
            PruningConfig(target_params=20000, groups=floor("ffn", 49)),
            "pruning.groups: ffn: floor 49 is above the model's 48",
        ),
        (
            PruningConfig(target_params=20000, groups=floor("head", 5)),
            "pruning.groups: head: floor 5 is above the model's 4",
        ),
        (
            PruningConfig(target_params=20000, groups=floor("stem", 33)),
            "pruning.groups: stem: floor 33 is above the model's 32",
        ),
        (
            PruningConfig(target_params=20000, groups=floor("steam", 3)),
            'pruning.groups: unknown kind of group "steam"; did you',
        ),
        (
            PruningConfig(target_params=20000, types=("head", "fnn")),
            'pruning.types: unknown kind of group "fnn"; did you mean ffn',
        ),
        (PruningConfig(target_params=20000, metric="taylor_frist"), "did you mean taylor_first"),
    ],
)
def test_a_target_that_makes_no_sense(workshop, pruning, words):
    with pytest.raises(UserError, match=words):
        open_inputs(configured(workshop, pruning=pruning))


def test_clusters_that_no_export_could_hold(workshop, tmp_path):
    config = tiny_config(model_type="olmo2", num_key_value_heads=2)
    write_hf_folder(tmp_path, config, random_llama_weights(config))
    model, target = ModelConfig(hf_model=str(tmp_path)), PruningConfig(target_params=20000)
    assert open_inputs(configured(workshop, model=model, pruning=target)).architecture.num_attention_heads == 4
    with pytest.raises(UserError, match=r"pruning\.gqa: cluster leaves .* of type olmo2 norms keys"):
        open_inputs(configured(workshop, model=model, pruning=dataclasses.replace(target, gqa="cluster")))


def test_a_folder_that_holds_a_run_already(workshop, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    checkpoint = dataclasses.replace(Config().checkpoint, save=str(tmp_path))
    with pytest.raises(UserError, match="already holds a run"):
        open_inputs(configured(workshop, checkpoint=checkpoint))


def test_missing_and_foreign_data(workshop, tmp_path):
    config = configured(workshop)
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, data_path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="none"):
        open_inputs(missing)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=4096))
    with pytest.raises(UserError, match=r"data\.seq_length: 4096 is beyond the model's 128 positions"):
        open_inputs(longer)


def test_tokenizer_of_another_model(workshop, tmp_path):
    hf_config = tiny_config(vocab_size=48)
    write_hf_folder(tmp_path, hf_config, random_llama_weights(hf_config))
    with pytest.raises(UserError, match="48"):
        open_inputs(configured(workshop, model=ModelConfig(hf_model=str(tmp_path))))


def test_damaged_weights(workshop, tmp_path):
    write_hf_folder(tmp_path, tiny_config(), random_llama_weights(tiny_config()))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_inputs(configured(workshop, model=ModelConfig(hf_model=str(tmp_path))))


def test_a_layout_that_does_not_fit_the_world(workshop):
    config = configured(workshop)
    layout = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor_model_parallel_size=3))
    with pytest.raises(UserError, match="4 processes"):
        validate(layout, world_size=4)
