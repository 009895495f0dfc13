"""SentencePiece models made by hand: every order of scores merges alike, and what has no exact form is refused by name.

SentencePiece itself is the oracle. Random BPE vocabularies hold what trained ones hardly show: pieces that score above
their own parts, pieces no merging makes, runs of one letter, equal scores.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="needs transformers: the extra hf")

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from megatron_prune.errors import UserError
from megatron_prune.huggingface.sentencepiece_model import PieceKind, SentencePieceModel, read_model
from megatron_prune.huggingface.sentencepiece_to_json import tokenizer_json
from megatron_prune.huggingface.tokenizer_export import export_tokenizer


def make(
    pieces: list[tuple[str, float, PieceKind]],
    *,
    model_type: str = "bpe",
    byte_fallback: bool = False,
    **normalizer: Any,
) -> sentencepiece_model_pb2.ModelProto:
    """A model of these pieces after <unk>, <s> and </s>; without normalization unless `normalizer` says otherwise."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = {"unigram": 1, "bpe": 2, "word": 3, "char": 4}[model_type]
    proto.trainer_spec.byte_fallback = byte_fallback
    defaults = {"name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    for name, value in {**defaults, **normalizer}.items():
        setattr(proto.normalizer_spec, name, value)
    bytes_ = [(f"<0x{byte:02X}>", 0.0, PieceKind.BYTE) for byte in range(256)] if byte_fallback else []
    named = [("<unk>", 0.0, PieceKind.UNKNOWN), ("<s>", 0.0, PieceKind.CONTROL), ("</s>", 0.0, PieceKind.CONTROL)]
    for text, score, kind in [*named, *bytes_, *pieces]:
        proto.pieces.add(piece=text, score=score, type=int(kind))
    return proto


def save(proto: sentencepiece_model_pb2.ModelProto, folder: Path) -> Path:
    path = folder / "hand.model"
    path.write_bytes(proto.SerializeToString())
    return path


def normal(**scores: float) -> list[tuple[str, float, PieceKind]]:
    """Normal pieces of these scores, and the single characters they need at the end."""
    letters = dict.fromkeys("".join(scores))
    return [(text, score, PieceKind.NORMAL) for text, score in {**dict.fromkeys(letters, -1000.0), **scores}.items()]


VOCABULARIES = st.lists(st.text("abc", min_size=2, max_size=6), unique=True, min_size=1, max_size=16)


@given(data=st.data(), texts=st.lists(st.text("abc", max_size=16), min_size=5, max_size=20))
def test_any_order_of_scores_gives_the_same_merges(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, texts: list[str]
) -> None:
    """Whatever vocabulary with distinct scores: pieces that come before their parts, that no merging makes, runs."""
    pieces = data.draw(VOCABULARIES)
    scores = data.draw(st.permutations(range(len(pieces))))
    proto = make(normal(a=-1000.0, b=-1000.0, c=-1000.0, **dict(zip(pieces, map(float, scores)))))
    path = save(proto, tmp_path_factory.getbasetemp())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    exported = Tokenizer.from_str(json.dumps(tokenizer_json(read_model(path), add_bos=False)))
    for text in texts:
        assert exported.encode(text).ids == oracle.encode(text)


@given(data=st.data(), texts=st.lists(st.text("ab", max_size=16), min_size=10, max_size=20))
def test_equal_scores_are_exact_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, texts: list[str]
) -> None:
    pieces = data.draw(VOCABULARIES.map(lambda texts: sorted({text.replace("c", "b") for text in texts})))
    scores = [float(data.draw(st.integers(-4, -1))) for _ in pieces]
    proto = make(normal(a=-1000.0, b=-1000.0, **dict(zip(pieces, scores))))
    path = save(proto, tmp_path_factory.getbasetemp())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    try:
        exported = Tokenizer.from_str(json.dumps(tokenizer_json(read_model(path), add_bos=False)))
    except UserError as refused:
        assert "have scores that leave their order to the text" in str(refused)
        return
    for text in texts:
        assert exported.encode(text).ids == oracle.encode(text)


def with_trainer(**fields: Any) -> sentencepiece_model_pb2.ModelProto:
    proto = make(normal(ab=-1.0))
    for name, value in fields.items():
        setattr(proto.trainer_spec, name, value)
    return proto


def with_denormalizer() -> sentencepiece_model_pb2.ModelProto:
    proto = make(normal(ab=-1.0))
    proto.denormalizer_spec.precompiled_charsmap = b"rules"
    return proto


def piece(text: str, kind: PieceKind) -> list[tuple[str, float, PieceKind]]:
    return [*normal(ab=-1.0), (text, 0.0, kind)]


@pytest.mark.parametrize(
    ("proto", "named"),
    [
        (lambda: make(normal(ab=-1.0), model_type="word"), "model_type word"),
        (lambda: make(normal(ab=-1.0), model_type="char"), "model_type char"),
        (lambda: with_trainer(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
        (lambda: make(normal(ab=-1.0), escape_whitespaces=False), "escape_whitespaces=false"),
        (with_denormalizer, "denormalizer_spec"),
        (lambda: make(piece("ba", PieceKind.UNUSED)), "unused pieces ['ba']"),
        (lambda: make(piece("ab", PieceKind.CONTROL)), "the repeated piece 'ab'"),
        (lambda: make(piece("c", PieceKind.CONTROL)), "a control piece of one character"),
        (lambda: make(piece("<a b>", PieceKind.USER_DEFINED)), "user_defined_symbols with spaces"),
        (
            lambda: make(piece("<a>", PieceKind.USER_DEFINED), model_type="unigram"),
            "user_defined_symbols of a unigram model",
        ),
        (
            lambda: make(piece("<0xab>", PieceKind.NORMAL), byte_fallback=True),
            "the piece ['<0xab>'] beside byte_fallback",
        ),
        (lambda: make(piece("\u2581a", PieceKind.NORMAL)), "pieces with '\\u2581', which is no piece itself"),
        (lambda: make(piece("qa", PieceKind.NORMAL)), "piece 'qa' is made of 'q'"),
        (lambda: make(normal(ab=-1.0, ba=-1.0)), "pieces 'ab' and 'ba' have scores that leave their order"),
        (lambda: make(normal(ab=-5.0, abc=-5.0)), "pieces 'abc' and 'ab' have scores that leave their order"),
        (
            lambda: make([*normal(**{"abcd": -1.0, "<": -9.0}), ("!", 0.0, PieceKind.USER_DEFINED)]),
            "tokenizer.json exactly, since its merges never make the piece 'abcd'",
        ),
        (
            lambda: make(normal(**{"<s": -1.0, "s>": -1.0, "<unk": -2.0, "unk>": -2.0}), model_type="unigram"),
            "piece '<unk>' cannot be told from the same text",
        ),
        (lambda: make(normal(ab=-1.0), precompiled_charsmap=b"\x10\0\0\0rubbish"), "precompiled_charsmap is damaged"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    tmp_path: Path, proto: Callable[[], sentencepiece_model_pb2.ModelProto], named: str
) -> None:
    with pytest.raises(UserError) as error:
        export_tokenizer(save(proto(), tmp_path), tmp_path / "out", None)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceModel:
    """A trained unigram model with a small normalization table of its own."""
    folder = tmp_path_factory.mktemp("normalizing")
    (folder / "rules.tsv").write_text("41\t61\n61 301\te1\n66 69\tfb01\n")
    (folder / "text.txt").write_text("The cat runs over the house, and the dog sleeps under the green stone\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=60, model_type="unigram",
        normalization_rule_tsv=str(folder / "rules.tsv"), hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return read_model(folder / "m.model")


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_a_damaged_normalization_table_is_read_or_refused(count: int, normalizing: SentencePieceModel) -> None:
    """tokenizers panics at some of them, and some lead in circles, which would never end."""

    def tried(charsmap: bytes) -> str:
        try:
            tokenizer_json(dataclasses.replace(normalizing, charsmap=charsmap), False)
        except UserError as error:
            assert str(error).isprintable()
            return str(error)
        return "read"

    whole = normalizing.charsmap
    size = int.from_bytes(whole[:4], "little")
    circle = (0x61 << 10 | 0x61).to_bytes(4, "little")  # wherever one looks, "a" leads further
    assert tried(whole) == "read"
    assert "'utf-8' codec" in tried(whole + b"\xff") and "no array" in tried(bytes([whole[0] + 1]) + whole[1:])
    assert "out of itself" in tried(whole[:4] + (1 << 30).to_bytes(4, "little") + whole[8:])
    assert "damaged (" in tried(whole[:4] + circle * (size // 4) + whole[4 + size :])
    ends = set()
    for seed in range(count):
        random, changed = Random(seed), bytearray(whole)
        for _ in range(random.randint(1, 3)):
            changed[random.choice([random.randrange(len(changed)), random.randrange(8)])] = random.randrange(256)
        ends.add(tried(bytes(changed)) == "read")
    assert ends == {True, False}
