"""Tokenizers give the ids of the libraries that own their files, and refuse what they cannot read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.data.tokenizer_files import HUGGING_FACE, SENTENCEPIECE
from megatron_prune.errors import UserError

TEXT = "  the cat sleeps\n\n\tunder 東京 – naïve 🙂 x"


def test_sentencepiece_gives_the_library_s_ids(sp_model: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    tokenizer = build_tokenizer(None, str(sp_model))
    assert tokenizer.kind == SENTENCEPIECE
    assert tokenizer.tokenize(TEXT) == library.encode(TEXT)
    assert tokenizer.tokenize_all([TEXT, "", "x"] * 70) == [library.encode(text) for text in [TEXT, "", "x"] * 70]
    assert tokenizer.detokenize(tokenizer.tokenize("the cat sleeps")) == "the cat sleeps"
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (library.vocab_size(), 1, 2)
    assert tokenizer.path == str(sp_model)


def test_stories260k_gives_the_known_ids(stories260k: Path) -> None:
    tokenizer = build_tokenizer(None, str(stories260k))
    assert tokenizer.tokenize("Once upon a time") == [403, 407, 261, 378]
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (512, 1, 2)


def test_hugging_face_gives_transformers_ids(hf_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    library = transformers.AutoTokenizer.from_pretrained(str(hf_folder))
    for path in (hf_folder, hf_folder / "tokenizer.json"):
        tokenizer = build_tokenizer(None, str(path))
        assert tokenizer.kind == HUGGING_FACE
        assert tokenizer.tokenize(TEXT) == library.encode(TEXT, add_special_tokens=False)
        assert tokenizer.tokenize_all([TEXT, "", "x"] * 70) == [*map(tokenizer.tokenize, [TEXT, "", "x"] * 70)]
        assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT
        assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (len(library), 0, 1)


def test_truncation_and_padding_in_tokenizer_json_are_ignored(hf_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tmp_path / "cut"
    shutil.copytree(hf_folder, folder)
    cut = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut.enable_truncation(3)
    cut.enable_padding(length=50)
    cut.save(str(folder / "tokenizer.json"))
    assert build_tokenizer(None, str(folder)).tokenize(TEXT) == build_tokenizer(None, str(hf_folder)).tokenize(TEXT)


def test_special_ids_come_from_the_model_s_config_too(hf_folder: Path, tmp_path: Path) -> None:
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        build_tokenizer(None, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": None, "eos_token_id": [1, 7]}))
    tokenizer = build_tokenizer(None, str(tmp_path))
    assert (tokenizer.bos, tokenizer.eod) == (None, 1)


@pytest.mark.parametrize("name", ["bert-corpus", "gpt2-corpus", "plain"])
def test_without_a_class_tokenizer_json_counts_and_no_folder_s_name(name: str, hf_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(hf_folder / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    tokenizer = build_tokenizer(None, str(folder))
    alone = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.tokenize(TEXT) == alone.encode(TEXT, add_special_tokens=False).ids
    assert (tokenizer.vocab_size, tokenizer.eod) == (alone.get_vocab_size(), alone.token_to_id("<|end|>"))


def test_vocab_json_and_merges_are_read_through_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    alphabet = ["<|endoftext|>", "c", "a", "t", "ca", "cat"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(alphabet)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    library = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    tokenizer = build_tokenizer(None, str(tmp_path))
    assert tokenizer.tokenize("catca") == library.encode("catca", add_special_tokens=False) == [5, 4]
    assert tokenizer.eod == 0


def test_a_folder_with_both_files_is_hugging_face_s_unless_told(
    hf_folder: Path, sp_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "both"
    shutil.copytree(hf_folder, folder)
    shutil.copy(sp_model, folder / "tokenizer.model")
    assert build_tokenizer(None, str(folder)).kind == HUGGING_FACE
    assert build_tokenizer(SENTENCEPIECE, str(folder)).kind == SENTENCEPIECE
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert build_tokenizer(None, str(folder)).kind == SENTENCEPIECE
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        build_tokenizer(HUGGING_FACE, str(folder))


def test_identity_is_the_content_not_the_path(sp_model: Path, hf_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copy(sp_model, tmp_path / "copy.model")
    here, there = build_tokenizer(None, str(sp_model)), build_tokenizer(None, str(copy))
    assert here.unique_identifiers == there.unique_identifiers
    assert here.unique_identifiers != build_tokenizer(None, str(hf_folder)).unique_identifiers


def test_data_sets_see_no_padding_id(sp_model: Path) -> None:
    assert build_tokenizer(None, str(sp_model)).pad == -1


def test_wrong_paths_and_types_are_named(tmp_path: Path, sp_model: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer_model.*nowhere does not exist"):
        build_tokenizer(None, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        build_tokenizer(None, str(tmp_path))
    with pytest.raises(UserError, match='tokenizer_type.*"GPT2" is unknown; use SentencePieceTokenizer or'):
        build_tokenizer("GPT2", str(sp_model))


SIDES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "config.json")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [*SIDES, "additional_chat_templates/tools.jinja"])
def test_a_file_that_leads_nowhere_is_not_taken_for_absent(tmp_path: Path, sp_model: Path, name: str) -> None:
    """A hub's cache that was copied without what its links lead to would lose added tokens and chat templates."""
    shutil.copyfile(sp_model, tmp_path / "tokenizer.model")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0123abcd")
    with pytest.raises(UserError, match=f"{name}: is a link to a file that is not there"):
        build_tokenizer(None, str(tmp_path))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a pipe"):
        build_tokenizer(None, str(tmp_path))


@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    if name.endswith(".json"):
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(b"this is no tokenizer")
    with pytest.raises(UserError, match=name):
        build_tokenizer(None, str(tmp_path / name))


def test_a_sentencepiece_model_without_eos_is_refused(text_file: Path, tmp_path: Path) -> None:
    from .conftest import train_sentencepiece

    model = train_sentencepiece(text_file, tmp_path / "endless", eos_id=-1)
    with pytest.raises(UserError, match="no end-of-sequence id"):
        build_tokenizer(None, str(model))


def test_a_missing_library_is_named(hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: install megatron-prune\[hf\]"):
        build_tokenizer(None, str(hf_folder))
