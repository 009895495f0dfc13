"""A stranger's folder that reaches out of itself: links to files of whoever reads it, settings that name such files.

What is text would travel on in an export or a GGUF file. A hub's cache, whose files are all links, is read as ever.
"""

import hashlib
import json
import os
import shutil

import pytest

from megatron_prune.commands import convert_to_gguf
from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.data.tokenizer_files import find_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import read_shape
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.huggingface.tokenizer_copy import copy_tokenizer
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

from .tokenizer_layouts import CHATML, LAYOUTS, write

WORDS = "\n".join(f"the quick brown fox number {i} jumps over {i * 7} lazy dogs" for i in range(200))
TEMPLATE = "additional_chat_templates/rag.jinja"
CARD = "---\nlicense: mit\n---\n"
FILES = {
    "llama3": ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
    "qwen": ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json"],
}
FILES["llama3"] += ["chat_template.jinja", TEMPLATE]
FILES["qwen"] += ["vocab.txt", "chat_template.jinja", "generation_config.json"]
SPARE = {"vocab.txt": "PRIVATE\n", "chat_template.jinja": CHATML, "chat_template.json": {"chat_template": CHATML}}


@pytest.fixture(scope="module", params=FILES)
def made(request, tmp_path_factory):
    """A model's folder with everything that a tokenizer may have."""
    folder = tmp_path_factory.mktemp("made") / request.param
    config = tiny_config(vocab_size=520)
    write_hf_folder(folder, config, random_llama_weights(config, 0))
    (folder.parent / "words").write_text(WORDS)
    LAYOUTS[request.param](folder, folder, folder.parent / "words")
    (folder / "README.md").write_text(CARD)
    for name in FILES[request.param]:
        if not (folder / name).exists():
            write(folder, {name: SPARE.get(name, {})})
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "models" / made.name)


def read_all(folder, save):
    """As import, training and export do."""
    read_shape(folder)
    facts = read_source(folder)
    FolderWeights(folder)
    build_tokenizer(None, str(folder))
    copy_tokenizer(find_tokenizer(folder), save)
    return facts


def move_out(file, private):
    """A link to it in its place; its content is that of a file that would be read."""
    private.parent.mkdir(exist_ok=True)
    file.rename(private)
    os.symlink(os.path.relpath(private, file.parent), file)


def test_links_to_files_elsewhere_are_refused(folder, tmp_path, capsys):
    read_all(folder, tmp_path / "save")
    for name in FILES[folder.name]:
        given = shutil.copytree(folder, tmp_path / "given" / name.replace("/", "_"))
        move_out(given / name, tmp_path / "private" / f"notes of {name.replace('/', '_')}")
        with pytest.raises(UserError, match="is a link out of its folder, to .*/private/notes of") as raised:
            read_all(given, tmp_path / "other")
        assert name in str(raised.value), name
        assert convert_to_gguf.main(["--hf-model", str(given), "--save", str(tmp_path / "m.gguf")]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
        assert not (tmp_path / "m.gguf").exists() and not (tmp_path / "other").exists()


def test_links_through_folders_are_seen_through(folder, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "vault.jinja").write_text(CHATML)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "additional_chat_templates").symlink_to(private)
    with pytest.raises(UserError, match=r"additional_chat_templates/vault.jinja: is a link out of its folder"):
        read_all(folder, tmp_path / "save")
    (folder / "additional_chat_templates").unlink()
    (folder / "inner").symlink_to(private)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("inner/vault.jinja")
    with pytest.raises(UserError, match=r"chat_template.jinja: is a link out of its folder"):
        read_all(folder, tmp_path / "save")


def test_a_card_elsewhere_is_not_read(folder, tmp_path):
    assert read_source(folder)["card"] == {"license": "mit"}
    move_out(folder / "README.md", tmp_path / "private")
    assert read_source(folder)["card"] == {}


def test_a_hubs_cache_and_a_folder_of_links_are_read(folder, tmp_path):
    """Snapshots link to blobs by their hashes, SHA-1 or SHA-256; folders for trying things out to a model's files."""
    cache = tmp_path / "models--org--small"
    snapshot, mine = cache / "snapshots" / ("0123abcd" * 5), tmp_path / "mine"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashed = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = cache / "blobs" / hashed(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        for place, target in ((snapshot, blob), (mine, file)):
            link = place / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent))
    (mine / "model.safetensors").unlink()
    (mine / "model.safetensors").symlink_to(folder / "model.safetensors")
    facts = read_all(folder, tmp_path / "save")
    card = facts["card"] | {"base_model": "org/small"}
    assert read_all(snapshot, tmp_path / "save2") == facts | {"name": "small", "card": card}
    assert read_all(mine, tmp_path / "save3") == facts | {"name": "mine"}
    names = [sorted(path.name for path in (tmp_path / save).rglob("*")) for save in ("save", "save2", "save3")]
    assert names[0] == names[1] == names[2]


def test_weights_may_lie_elsewhere_under_any_name(folder, tmp_path):
    move_out(folder / "model.safetensors", tmp_path / "big" / "weights of a run")
    read_all(folder, tmp_path / "save")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", lambda file: {"tokenizer_class": "BertTokenizer", "vocab": file}),
        ("tokenizer_config.json", lambda file: {"tokenizer_class": "BertTokenizer", "init_inputs": [file]}),
        ("tokenizer_config.json", lambda file: {"tokenizer_class": "LlamaTokenizer", "vocab_file": file}),
        ("tokenizer_config.json", lambda file: {"sp_model_kwargs": {"model_file": file}}),
        ("special_tokens_map.json", lambda file: {"vocab": file}),
    ],
)
def test_settings_that_name_files_elsewhere_are_refused(file, settings, tmp_path):
    """transformers would read the lines of that file as tokens, which the export would then hold."""
    private = tmp_path / "private"
    private.write_text("[UNK]\nfirst line\nsecond line\n")
    write(tmp_path / "m", {"vocab.json": {"a": 0}, file: settings(str(private))})
    with pytest.raises(UserError, match=f"{file}: names the file .*private, outside of its folder"):
        build_tokenizer(None, str(tmp_path / "m"))


def test_settings_may_say_where_they_were_once_saved(folder, tmp_path):
    (tmp_path / "there").write_text("")
    config = {"name_or_path": str(tmp_path / "there"), "special_tokens_map_file": str(tmp_path / "there")}
    file = folder / "tokenizer_config.json"
    write(folder, {file.name: json.loads(file.read_text()) | config})
    read_all(folder, tmp_path / "save")
