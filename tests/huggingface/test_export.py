"""The exported folder: whole or not there, in shards of the asked size, with all that a reader of it needs."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape, shape_from_config
from megatron_prune.huggingface.export import Exported, export, stored_weights
from megatron_prune.huggingface.model_card import CardFacts
from megatron_prune.huggingface.provenance import dtypes_of, run_facts, source_of, tokenizer_of
from megatron_prune.huggingface.replacing import LIST
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.huggingface.verify_export import load_stock_model, sample_tokens, stock_logits, wrong_weight
from megatron_prune.huggingface.weights import FolderWeights, live_view
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, STEM
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

CONFIG = tiny_config(num_key_value_heads=2)
FULL = Architecture.full(shape_from_config(CONFIG))
# One of the two query heads of a KV head left in one layer, none in another: no plain grouped-query attention.
UNEVEN = FULL.without(Group.of(HEAD, ((0,), (1,), (2,), (3,)))).without(Group.of(HEAD, ((1,), (2,), (3,), (2,))))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_llama_weights(CONFIG)


def export_it(weights: dict[str, Tensor], save: Path, architecture: Architecture = FULL, **options: Any) -> Exported:
    return export(live_view(weights.__getitem__, architecture), architecture, save, **options)


def refusal(weights: dict[str, Tensor], save: Path, architecture: Architecture = FULL, **options: Any) -> str:
    """The message; and nothing may be left behind."""
    before = sorted(save.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        export_it(weights, save, architecture, **options)
    assert sorted(save.parent.rglob("*")) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_have_the_asked_size_and_load_in_transformers(weights: dict[str, Tensor], tmp_path: Path) -> None:
    done = export_it(weights, tmp_path / "out", max_shard_size="30KB")
    assert len(done.files) > 3 and all(file.stat().st_size < 30_000 + 5_000 for file in done.files)
    one = export_it(weights, tmp_path / "one")
    assert [file.name for file in one.files] == ["model.safetensors"]
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock_logits(tmp_path / "out", tokens), stock_logits(tmp_path / "one", tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_asked_dtype(dtype: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_it(weights, tmp_path / "out", dtype=dtype)
    read = FolderWeights(tmp_path / "out")
    for name, tensor in weights.items():
        assert torch.equal(read(name), tensor.to(getattr(torch, dtype)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38), (None, float("nan"))])
def test_values_that_would_not_be_finite_are_refused(
    dtype: str | None, value: float, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = weights | {name: weights[name].index_fill(0, torch.tensor([3]), value)}
    told = refusal(wrong, tmp_path / "out", **({"dtype": dtype} if dtype else {}))
    assert name in told and ("holds values beyond its range" if dtype else "NaN or infinite") in told


def test_dtype_is_kept_unless_asked(weights: dict[str, Tensor], tmp_path: Path) -> None:
    done = export_it({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "out")
    assert done.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_each_tensor_is_asked_for_once_and_in_model_order(weights: dict[str, Tensor], tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return weights[name]

    export(read, FULL, tmp_path / "out", dtype="float32", max_shard_size="20KB")
    assert sorted(asked) == sorted(weights) and asked[0] == "model.embed_tokens.weight"


def test_folder_in_the_way_is_left_alone(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save = tmp_path / "out"
    save.mkdir()
    export_it(weights, save)  # an empty folder is no obstacle
    assert "is not empty" in refusal(weights, save)
    pruned = FULL.without(Group.of(STEM, ((3,),)))
    export_it(weights, save, pruned, overwrite=True)
    assert read_shape(save).hidden_size == 31
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "'thesis.txt' is not known" in refusal(weights, other, overwrite=True)
    assert "is a file" in refusal(weights, other / "thesis.txt")
    downloaded = write_hf_folder(tmp_path / "downloaded", CONFIG, weights)
    assert "is not known" in refusal(weights, downloaded, overwrite=True)


def test_overwriting_keeps_what_the_export_did_not_write(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    export_it(weights, save, max_shard_size="30KB")
    elsewhere.mkdir()
    (elsewhere / "data.txt").write_text("precious")
    mine = {"model.gguf": b"gguf", "notes/deep/a b.txt": b"mine", "zz.safetensors": b"other"}
    for name, content in mine.items():
        (save / name).parent.mkdir(parents=True, exist_ok=True)
        (save / name).write_bytes(content)
    (save / "link").symlink_to(elsewhere)
    (save / "empty").mkdir()
    export_it(weights, save, overwrite=True)
    assert {name: (save / name).read_bytes() for name in mine} == mine
    assert (save / "empty").is_dir() and (save / "link").is_symlink()
    assert (elsewhere / "data.txt").read_text() == "precious"
    assert not list(save.glob("model-*")), "shards of the earlier export are its own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    once_more = export_it(weights, save, overwrite=True)
    assert torch.equal(FolderWeights(once_more.folder)("model.norm.weight"), weights["model.norm.weight"])
    assert {name: (save / name).read_bytes() for name in mine} == mine


def test_overwriting_refuses_what_somebody_changed_or_would_lose(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save = tmp_path / "out"
    export_it(weights, save)
    card = (save / "README.md").read_bytes()
    (save / "README.md").write_bytes(card[:-1] + b"!")
    assert "'README.md' was changed" in refusal(weights, save, overwrite=True)
    (save / "README.md").write_bytes(card)
    taken = save / "model-00001-of-00002.safetensors"  # a name that the next export needs
    taken.write_bytes(b"mine")
    assert f"'{taken.name}' was not written by this tool" in refusal(
        weights, save, overwrite=True, max_shard_size="100KB"
    )
    assert taken.read_bytes() == b"mine"
    taken.unlink()
    (save / LIST).write_text(json.dumps({"files": {"../elsewhere/data.txt": {"size": 4}}}))
    assert "outside" in refusal(weights, save, overwrite=True)
    (save / LIST).write_text("[]")
    assert "is damaged" in refusal(weights, save, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_exports_into_one_folder_are_refused_in_one_line(
    weights: dict[str, Tensor], tmp_path: Path, overwrite: bool
) -> None:
    save, told = tmp_path / "out", []
    if overwrite:
        export_it(weights, save)

    def read(name: str) -> Tensor:
        told.append(refusal(weights, save, overwrite=overwrite))
        return weights[name]

    export(read, FULL, save, dtype="float32", overwrite=overwrite)
    assert len(told) > 3
    assert {words.partition(" on ")[0] for words in told} == {f"--save {save}: is being written by pid {os.getpid()}"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert torch.equal(FolderWeights(save)("model.norm.weight"), weights["model.norm.weight"])
    (tmp_path / ".out.writer").write_text("pid 4711 on elsewhere")  # killed: it holds no lock any more
    export_it(weights, save, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_processes_that_export_into_one_folder_at_once_leave_one_whole_export(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """Each of five has weights of its own; what stands in the end is all of one of them, and nothing beside it."""
    save = tmp_path / "out"
    context = multiprocessing.get_context("fork")
    many = [context.Process(target=export_number, args=(number, weights, save)) for number in range(1, 6)]
    for process in many:
        process.start()
    for process in many:
        process.join(60)
    codes = [process.exitcode for process in many]
    assert set(codes) <= {0, 2} and 0 in codes
    read = FolderWeights(save)
    times = {float((read(name).flatten()[0] / tensor.flatten()[0]).round()) for name, tensor in weights.items()}
    assert len(times) == 1 and codes[int(times.pop()) - 1] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def export_number(number: int, weights: dict[str, Tensor], save: Path) -> None:
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            export_it({name: tensor * number for name, tensor in weights.items()}, save, overwrite=True)
    except UserError as error:
        assert "is being written by" in str(error), error
        os._exit(2)


def test_an_export_killed_between_its_renames_loses_neither(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save, old = tmp_path / "out", tmp_path / ".out.0123abcd.replaced"
    export_it(weights, save)
    (save / "mine.txt").write_text("precious")
    save.rename(old)  # the first rename was its last act
    with pytest.raises(UserError, match="is not empty"):
        export_it(weights, save)
    assert (save / "mine.txt").read_text() == "precious" and not old.exists()
    save.rename(old)
    other = tmp_path / "other"
    export_it(weights, other)
    other.rename(save)  # or the second
    export_it(weights, save, overwrite=True)
    assert (save / "mine.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def mixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """bfloat16 but for the norms, whose values bfloat16 does not hold."""
    return {
        name: tensor + 1e-4 if name.endswith("norm.weight") else tensor.bfloat16() for name, tensor in weights.items()
    }


def test_norms_apart_stay_in_their_dtype_and_bits_are_compared(weights: dict[str, Tensor], tmp_path: Path) -> None:
    stored = mixed(weights)
    source = write_hf_folder(tmp_path / "source", CONFIG | {"torch_dtype": "float32"}, stored)
    dtype, others = dtypes_of({"source": read_source(source)}, "float32")
    assert dtype == "bfloat16" and set(others) == {name for name in stored if name.endswith("norm.weight")}
    trained = {name: tensor.float() for name, tensor in stored.items()}  # as a checkpoint in float32 holds them
    done = export_it(trained, tmp_path / "out", dtype=dtype, other_dtypes=others, max_shard_size="30KB")
    before, after = FolderWeights(source), FolderWeights(done.folder)
    assert {name: after.stored[name].dtype for name in stored} == {name: t.dtype for name, t in stored.items()}
    assert all(torch.equal(before(name), after(name)) for name in stored)
    assert after.total_bytes == before.total_bytes
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == after.total_bytes
    model = load_stock_model(done.folder, dtype=torch.float32)
    assert wrong_weight(model, stored_weights(trained.__getitem__, FULL, done.plan, done.dtypes)) is None
    # A norm that was rounded to bfloat16 is wrong, and so is a matrix that was not.
    name = "model.norm.weight"
    model.state_dict()[name].copy_(trained[name].bfloat16())
    assert wrong_weight(model, stored_weights(trained.__getitem__, FULL, done.plan, done.dtypes)) == name
    model = load_stock_model(done.folder, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    model.state_dict()[name].view(torch.int32)[0, 0] ^= 1  # below bfloat16's last bit
    assert wrong_weight(model, stored_weights(trained.__getitem__, FULL, done.plan, done.dtypes)) == name


@pytest.mark.parametrize("recorded", [{}, {"dtype": None}, {"dtype": "float64"}, {"dtype": "auto", "dtypes": {}}])
def test_checkpoint_s_dtype_is_taken_where_the_source_s_is_not_known(recorded: dict[str, Any]) -> None:
    assert dtypes_of({"source": recorded}, "bfloat16") == ("bfloat16", {})


def test_failure_in_the_middle_leaves_nothing(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        if name == "model.layers.2.mlp.up_proj.weight":
            raise UserError("checkpoint: damaged")
        return weights[name]

    with pytest.raises(UserError, match="damaged"):
        export(read, FULL, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_wrong_options_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save = tmp_path / "out"
    assert "--dtype int8: unknown" in refusal(weights, save, dtype="int8")
    assert "--max-shard-size plenty" in refusal(weights, save, max_shard_size="plenty")
    assert "--kv-policy some: unknown" in refusal(weights, save, kv_policy="some")
    assert "use expand" in refusal(weights, save, UNEVEN, kv_policy="native")
    large = weights | {"model.norm.weight": torch.full((32,), 7e4)}
    assert "model.norm.weight holds values beyond" in refusal(large, save, dtype="float16")


def test_kv_policy_is_chosen_and_told(weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert export_it(weights, tmp_path / "native").plan.policy == "native"
    done = export_it(weights, tmp_path / "expand", UNEVEN, facts=CardFacts())
    assert (done.plan.policy, done.plan.num_key_value_heads) == ("expand", 2)
    read, rows = FolderWeights(tmp_path / "expand"), weights["model.layers.0.self_attn.k_proj.weight"]
    # Layer 0 keeps query heads 2 and 3, both of KV head 1, which is stored twice.
    assert torch.equal(read("model.layers.0.self_attn.k_proj.weight"), torch.cat([rows[8:], rows[8:]]))
    card = (tmp_path / "expand/README.md").read_text()
    assert f"{done.stored_parameters:,} stored parameters" in card


def test_model_card_tells_what_the_run_did_and_no_path(weights: dict[str, Tensor], tmp_path: Path) -> None:
    history = [
        {"kind": "ffn", "tokens": 1000, "iteration": 5},
        {"kind": "ffn", "tokens": 3000, "iteration": 7},
        {"group": "stem", "tokens": 4096, "iteration": 8},
    ]
    config = "\n".join(
        [
            "model: {hf_model: /home/somebody/models/tiny-source}",
            "data: {data_path: 0.3 /data/private/books 0.7 /data/web, seq_length: 256, tokenizer_type: null}",
            "optimizer: {lr: 0.003, clip_grad: 1.0}",
            "pruning: {target_params: 20000, gqa: kv_group, replay: null}",
            "checkpoint: {save: /home/somebody/run}",
        ]
    )
    meta = {
        "iteration": 20,
        "consumed_tokens": 123456,
        "history": history,
        "config": config,
        "stages": {"source": {"validation_loss": 1.748}, "final": {"validation_loss": 1.9461}},
        "source": {"name": "tiny-source", "special_ids": {}, "generation_config": {}},
    }
    pruned = FULL.without(Group.of(STEM, ((3,),))).without(Group.of(FFN, ((3,),) * 4))
    export_it(weights, tmp_path / "out", pruned, facts=run_facts(meta), source=source_of(meta))
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        f"# tiny-source pruned to {pruned.parameters / 1000:.3g}K parameters",
        f"{pruned.parameters:,} parameters",
        f"{FULL.parameters:,}",
        "| hidden size | 32 | 31 |",
        "| FFN channels of a layer | 48 | 47 |",
        "123,456",
        "4,096",
        "| ffn groups removed | 2 |",
        "1.9461",
        "1.7480",
        "target_params: 20000",
        "data_path: 0.3 books 0.7 web",
        "arXiv 2502.06663",
    ):
        assert words in card, words
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert b"/home" not in content and b"/data/" not in content and str(tmp_path).encode() not in content, file


CARD = "---\nlicense: apache-2.0\nlicense_link: LICENSE\nlanguage: [en]\nbase_model: [somebody/Tiny-1M]\n---\n# Tiny\n"


@pytest.mark.parametrize(
    ("folder", "card", "base", "licence"),
    [
        ("source", CARD, "somebody/Tiny-1M", {"license": "apache-2.0"}),
        ("models--org--Tiny-1M-Chat/snapshots/0123ab", CARD, "org/Tiny-1M-Chat", {"license": "apache-2.0"}),
        ("source", "---\nbase_model: /home/somebody/tiny\nlicense: [mit\n---\n", None, {}),
        ("source", "---\nbase_model: ../tiny\n---\n", None, {}),
        ("source", "# Tiny\n", None, {}),
        ("source", None, None, {}),
    ],
)
def test_card_names_base_model_and_licence(weights, tmp_path, folder, card, base, licence) -> None:
    source = tmp_path / folder
    export_it(weights, source)
    (source / "README.md").unlink()
    if card is not None:
        (source / "README.md").write_text(card)
    pruned = FULL.without(Group.of(STEM, ((3,),)))
    export_it(weights, tmp_path / "out", pruned, facts=run_facts({"source": read_source(source)}))
    text = (tmp_path / "out/README.md").read_text()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata.get("base_model") == base
    assert {name: value for name, value in metadata.items() if name.startswith("license")} == licence
    assert metadata["tags"] == ["megatron-prune", "pruned"] and metadata["library_name"] == "transformers"
    assert f"# {base.partition('/')[2] if base else 'source'} pruned to {pruned.parameters / 1000:.3g}K" in text


def test_meta_without_anything_is_enough(weights: dict[str, Tensor], tmp_path: Path) -> None:
    assert run_facts({}) == CardFacts() and tokenizer_of({}) is None and source_of({}) == {}
    export_it(weights, tmp_path / "out", facts=run_facts({}))
    assert "## Training" not in (tmp_path / "out/README.md").read_text()


def test_recorded_tokenizer_is_found(tmp_path: Path) -> None:
    assert tokenizer_of({"tokenizer_model": "a/tokenizer.model"}) == (None, "a/tokenizer.model")
    config = "data: {tokenizer_model: t.model, tokenizer_type: SentencePieceTokenizer}\nmodel: {hf_model: source}"
    assert tokenizer_of({"config": config}) == ("SentencePieceTokenizer", "t.model")
    assert tokenizer_of({"config": "model: {hf_model: source}"}) == (None, "source")


def test_generation_settings_and_special_ids_come_along(weights: dict[str, Tensor], tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = CONFIG | {"eos_token_id": [2, 5], "pad_token_id": -1}
    source = write_hf_folder(tmp_path / "source", config, weights)
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6}))
    export_it(weights, tmp_path / "out", source=read_source(source))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (1, [2, 5], None)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.do_sample, generation.temperature, generation.eos_token_id) == (True, 0.6, [2, 5])


# With a real tokenizer and a real model -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_tokenizer_of_the_export_gives_the_ids_trained_with(
    model_type: str, stories260k: Path, tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    full = Architecture.full(read_shape(stories260k))
    gone = 4 if model_type == "mistral" else 0  # channels, so that hidden is no multiple of 8
    for channel in range(0, 3 * gone, 4):
        full = full.without(Group.of(STEM, ((channel,),)))
    read = live_view(FolderWeights(stories260k), full)
    with caplog.at_level(logging.WARNING):
        done = export(read, full, tmp_path / "out", tokenizer_model=str(stories260k), source=read_source(stories260k))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert done.class_name.lower().startswith(model_type)
    assert "regex" not in caplog.text, "transformers takes it for a tokenizer with Mistral's known defect"
    ours = sentencepiece.SentencePieceProcessor(model_file=str(stories260k / "tokenizer.model"))
    assert tokenizer("Once upon a time", add_special_tokens=False)["input_ids"] == [403, 407, 261, 378]
    text = tinystories.read_text()[:20_000]
    expected = ours.encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    tokens = sample_tokens(tmp_path / "out", text, 512, 2, 100)
    assert np.array_equal(tokens.flatten(), expected[:200])


def test_tokenizer_with_more_ids_than_the_model_is_refused(
    weights: dict[str, Tensor], stories260k: Path, tmp_path: Path
) -> None:
    words = refusal(weights, tmp_path / "out", tokenizer_model=str(stories260k / "tokenizer.model"))
    assert "has 512 ids, the model 64; use the model's own tokenizer" in words


def test_real_model_generates_the_known_text_after_export(stories260k: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    full = Architecture.full(read_shape(stories260k))
    read = FolderWeights(stories260k)
    export(read, full, tmp_path / "out", tokenizer_model=str(stories260k), kv_policy="expand")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[1, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]])
    output = model.generate(prompt, max_new_tokens=30, do_sample=False)
    text = tokenizer.decode(output[0][prompt.shape[1] :])
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")
