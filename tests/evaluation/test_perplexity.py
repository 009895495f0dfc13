"""Losses are the plain sum over every token of the text; windows, batches and framing are what they are said to be."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.errors import UserError
from megatron_prune.evaluation.corpora import (
    IGNORED,
    IndexedOptions,
    TextOptions,
    indexed_corpus,
    is_text,
    text_corpus,
)
from megatron_prune.evaluation.models import ModelFolder, load_model, open_candidate
from megatron_prune.evaluation.perplexity import measure

LENGTH = 48


@pytest.fixture
def candidate(model_folders: tuple[Path, Path], tmp_path: Path) -> ModelFolder:
    return open_candidate(model_folders[0], "large", tmp_path)


@pytest.mark.parametrize("bos, eod", [(False, False), (True, False), (True, True)])
def test_every_token_of_a_text_is_predicted_once(
    candidate: ModelFolder, text_file: Path, sp_model: Path, bos: bool, eod: bool
) -> None:
    tokenizer = candidate.tokenizer()
    corpus = text_corpus(TextOptions(str(text_file), bos, eod), tokenizer, LENGTH)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    documents = text_file.read_text(encoding="utf-8").strip().split("\n\n")
    expected = [
        token
        for text in documents
        for token in [1] * bos + processor.encode(text) + [2] * eod  # bos is 1, eos 2
    ]
    windows = [corpus.windows[number] for number in range(len(corpus.windows))]
    assert {len(row) for pair in windows for row in pair} == {LENGTH}
    labels = torch.cat([label for _, label in windows])
    assert labels[labels != IGNORED].tolist() == expected
    assert torch.cat([tokens for tokens, _ in windows])[: len(expected)].tolist() == [2, *expected[:-1]]
    assert corpus.text_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.words == sum(len(text.split()) for text in documents)


def test_loss_is_that_of_the_plain_sum(candidate: ModelFolder, text_file: Path) -> None:
    corpus = text_corpus(TextOptions(str(text_file)), candidate.tokenizer(), LENGTH)
    assert len(corpus.windows) > 4
    model = load_model(candidate, "cpu")
    done: list[int] = []
    found = measure(model, corpus, 4, "cpu", done.append)
    total, count = 0.0, 0
    for number in range(len(corpus.windows)):
        tokens, labels = corpus.windows[number]
        kept = int((labels != IGNORED).sum())
        with torch.no_grad():  # alone and without its filling
            log = model(tokens[None, :kept]).logits[0].double().log_softmax(-1)
        total -= float(log[torch.arange(kept), labels[:kept]].sum())
        count += kept
    assert sum(done) == found.windows == len(corpus.windows) and found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / corpus.text_bytes, rel=1e-6)
    assert found.word_perplexity == pytest.approx(math.exp(total / corpus.words), rel=1e-5)
    assert found.loss_stderr is not None and 0 < found.loss_stderr < 1
    assert measure(model, corpus, 1, "cpu").loss == pytest.approx(found.loss, rel=1e-6)


def test_fewer_windows_know_no_bytes(candidate: ModelFolder, text_file: Path) -> None:
    corpus = text_corpus(TextOptions(str(text_file), samples=1), candidate.tokenizer(), LENGTH)
    found = measure(load_model(candidate, "cpu"), corpus, 8, "cpu")
    assert (found.windows, found.tokens) == (1, LENGTH)
    assert found.bits_per_byte is found.word_perplexity is found.loss_stderr is None


def test_data_set_and_text_agree(candidate: ModelFolder, text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    """A document alone in its data set: the same tokens in the same order, but for the ends."""
    options = Options(str(sp_model), append_eod=True, document_separator="file")
    preprocess([str(text_file)], str(tmp_path / "data"), options)
    indexed = indexed_corpus(IndexedOptions(str(tmp_path / "data")), candidate, LENGTH, tmp_path / "cache")
    framed = TextOptions(str(text_file), append_eod=True, document_separator="file")
    text = text_corpus(framed, candidate.tokenizer(), LENGTH)
    ids = [int(token) for number in range(len(text.windows)) for token in text.windows[number][1] if token != IGNORED]
    rows = sorted(
        (
            tuple(map(tuple, (a.tolist(), b.tolist())))
            for a, b in (indexed.windows[i] for i in range(len(indexed.windows)))
        ),
        key=lambda row: ids.index(row[0][0]) if len(set(ids)) == len(ids) else 0,
    )
    starts = {tuple(ids[start : start + LENGTH]) for start in range(0, len(ids) - LENGTH, LENGTH)}
    assert {tokens for tokens, _ in rows} == starts
    assert all(tokens[1:] == labels[:-1] for tokens, labels in rows)
    assert indexed.text_bytes is None


def test_paths_are_told_apart(text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    preprocess([str(text_file)], str(tmp_path / "data"), Options(str(sp_model)))
    assert is_text(str(text_file))
    assert not is_text(str(tmp_path / "data")) and not is_text(f"0.5 {tmp_path / 'data'} 0.5 {text_file}")
    with pytest.raises(UserError, match="--data-path: nowhere is neither a text file nor the prefix"):
        is_text("nowhere")


def test_blend_needs_a_length(candidate: ModelFolder, text_file: Path, sp_model: Path, tmp_path: Path) -> None:
    for name in "ab":
        preprocess([str(text_file)], str(tmp_path / name), Options(str(sp_model), append_eod=True))
    blend = f"0.5 {tmp_path / 'a'} 0.5 {tmp_path / 'b'}"
    with pytest.raises(UserError, match="--eval-samples"):
        indexed_corpus(IndexedOptions(blend), candidate, LENGTH, tmp_path / "cache")
    corpus = indexed_corpus(IndexedOptions(blend, samples=6), candidate, LENGTH, tmp_path / "cache")
    assert corpus.name == "a + b" and len(corpus.windows) == 6


def test_text_of_nothing_is_refused(candidate: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.txt holds no text"):
        text_corpus(TextOptions(str(tmp_path / "empty.txt")), candidate.tokenizer(), LENGTH)


def test_bare_sentencepiece_file_gets_its_exact_form(
    model_folders: tuple[Path, Path], sp_model: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    found = open_candidate(model_folders[1], "small", tmp_path)
    assert found.tokenizer_folder is not None and found.tokenizer_folder != model_folders[1]
    assert not (model_folders[1] / "tokenizer.json").exists(), "a model's own folder stays as it is"
    text = text_file.read_text(encoding="utf-8")[:2000]
    ids = sentencepiece.SentencePieceProcessor(model_file=str(sp_model)).encode(text)
    assert AutoTokenizer.from_pretrained(str(found.tokenizer_folder))(text)["input_ids"] == ids
    assert found.tokenizer().tokenize(text) == ids


def test_a_token_without_a_row_is_named(real_data: Path, tmp_path: Path) -> None:
    """A text that spells out a token which the tokenizer's folder adds, and the model lacks."""
    import json
    import shutil

    from megatron_prune.data.tokenizer import build_tokenizer

    shutil.copyfile(real_data / "stories260K" / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 512}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = build_tokenizer(None, str(tmp_path))
    (tmp_path / "plain.txt").write_text("Once upon a time.\n")
    (tmp_path / "marked.txt").write_text("Once upon a <pad> time.\n")
    assert text_corpus(TextOptions(str(tmp_path / "plain.txt")), tokenizer, 8, 512).text_bytes in (17, 18)
    with pytest.raises(UserError, match="there is no row for id 512"):
        text_corpus(TextOptions(str(tmp_path / "marked.txt")), tokenizer, 8, 512)


def test_a_tokenizer_that_is_no_text_is_one_line(model_folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folders[0], tmp_path / "model")
    (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "scratch").mkdir()
    with pytest.raises(UserError, match="tokenizer.json"):
        open_candidate(folder, "garbled", tmp_path / "scratch").adds_bos()
