"""The exported tokenizer gives, as AutoTokenizer loads it, the ids SentencePiece gives; what cannot is refused.

SentencePiece itself is the oracle throughout: on real text with the pretrained stories260K's model, on arbitrary
Unicode with small models of every kind trained here.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="needs transformers: the extra hf")

import sentencepiece
from transformers import AutoTokenizer

from megatron_prune.errors import UserError
from megatron_prune.huggingface.sentencepiece_model import read_model
from megatron_prune.huggingface.tokenizer_export import NASTY_TEXTS, export_tokenizer, verify_tokenizer

WRITTEN = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"}

# Real text, and lines so that the small models know accents, other scripts, digits in runs and doubled characters.
CORPUS = [
    *"\n".join(topics[name] for name in sorted(topics))[:60_000].split("\n"),
    *[
        "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m \ufb01ve",
        "\u6f22\u5b57\u304b\u306a\u3002 \ud55c\uad6d\uc5b4",
        "0 00 000 1111",
    ]
    * 6,
    *["if x:    return    y", "<s> <unk> <0x41> [INST]", "Once upon a time, there was a little girl."] * 6,
]
# Rules that map one character, several to one, one to several, one to none, line ends, and a piece of another rule.
RULES = {
    "\t": " ",
    "\n": " ",
    "\r\n": "\n",
    "...": "\u2026",
    "A": "a",
    "\u2460": "(1)",
    "\u00e9": "e",
    "e\u0301": "e",
    "e\u0301\u0323": "\u1eb9",
    "\x01": "",
    "ab": "ba",
}

FRAGMENTS = (
    *(" ", "  ", "\u2581", "\n", "\r\n", "\t", "\u00a0", "\u200b", "the", " of", "return", "000", "aa", "ab", "A", "e"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "<",
        "s>",
        "0x0A>",
        "<ud>",
        "<u",
        "[SEP]",
        "...",
        "\u2460",
        "\u00e9",
        "\x01",
        "\x02",
    ),
    *(
        "\u0301",
        "\u0323",
        "\u0338",
        "\u0345",
        "\u3099",
        "\u304b",
        "\uff76",
        "\uff9e",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\uac00",
    ),
    *(
        "\u0600",
        "\u200d",
        "\U0001f468",
        "\U0001f1e9",
        "\U000105d2",
        "\u0307",
        "\ufff9",
        "\ufffa",
        "|",
        "~",
        "!",
        "\ufb01",
    ),
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS), st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1), max_size=8)
    ),
    max_size=20,
).map("".join)


def train(path: Path, **options: Any) -> Path:
    """Train a small SentencePiece model on CORPUS; options as spm_train has them."""
    with io.BytesIO() as written:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=written,
            **{"vocab_size": 800, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2, **options},
        )
        path.write_bytes(written.getvalue())
    return path


def rules_file(folder: Path, rules: dict[str, str]) -> Path:
    """A normalization_rule_tsv: code points in hexadecimal, the source and the target."""
    path = folder / "rules.tsv"
    lines = ("\t".join(" ".join(f"{ord(char):X}" for char in text) for text in rule) for rule in rules.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def normalization(folder: Path, name: str) -> dict[str, Any]:
    """Options of spm_train for the normalizations tried here."""
    options: dict[str, dict[str, Any]] = {
        "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "identity, spaces collapsed": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
        "rules": {"normalization_rule_tsv": str(rules_file(folder, RULES)), "remove_extra_whitespaces": False},
        "rules, spaces collapsed": {"normalization_rule_tsv": str(rules_file(folder, RULES))},
    }
    return options[name]


class Pair:
    """A SentencePiece model and its exported form, loaded."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
        export_tokenizer(model, folder, None)
        self.exported = AutoTokenizer.from_pretrained(str(folder))
        self.is_unigram = read_model(model).model_type == "unigram"

    def check(self, text: str) -> None:
        """Same ids, same decoded text; for unigram models, ids of equal score (to rounding) are as good."""
        expected = self.oracle.encode(text)
        got = self.exported(text, add_special_tokens=False)["input_ids"]
        if got != expected and self.is_unigram:
            scores = [sum(self.oracle.get_score(i) for i in ids) for ids in (got, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5 * (1 + abs(scores[1])))
            assert self.oracle.decode(got) == self.oracle.decode(expected)
            return
        assert got == expected
        assert self.exported.decode(got) == self.oracle.decode(expected)


# The pretrained model and real text.


@pytest.fixture(scope="module")
def stories(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pretrained model's tokenizer.model, and a folder with its exported form."""
    folder = tmp_path_factory.mktemp("stories")
    export_tokenizer(stories260k / "tokenizer.model", folder, 512)
    return stories260k / "tokenizer.model", folder


def test_stories260k_gives_the_ids_it_was_trained_with(stories: tuple[Path, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(stories[1]))
    assert tokenizer("Once upon a time") == {"input_ids": [403, 407, 261, 378], "attention_mask": [1, 1, 1, 1]}
    assert tokenizer.decode([403, 407, 261, 378]) == "Once upon a time"
    named = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (*named, len(tokenizer), tokenizer.model_max_length) == (0, 1, 2, None, 512, 512)


@pytest.mark.parametrize("unit", ["paragraphs", "chunks of 50,000 characters"])
@pytest.mark.parametrize("name", ["tinystories_944k", "wikitext2_tok_valid", "tinyshakespeare"])
def test_same_ids_on_a_megabyte_of_real_text(stories: tuple[Path, Path], real_data: Path, name: str, unit: str) -> None:
    text = (real_data / "text" / f"{name}.txt").read_text(encoding="utf-8")
    paragraphs = text.split("\n \n" if name.startswith("wikitext") else "\n\n")
    assert len(paragraphs) > 500
    chunks = [text[start : start + 50_000] for start in range(0, len(text), 50_000)]
    verify_tokenizer(*stories, paragraphs if unit == "paragraphs" else chunks)


# Models of every kind on arbitrary text.


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (model_type, byte_fallback, prefix, rule),
            id=f"{model_type}{'-bytes' * byte_fallback}{'-prefix' * prefix}-{rule}",
            marks=[pytest.mark.full] if (number + byte_fallback + prefix) % 2 else [],
        )
        for model_type in ("bpe", "unigram")
        for byte_fallback in (False, True)
        for prefix in (False, True)
        for number, rule in enumerate(("identity", "rules", "rules, spaces collapsed", "identity, spaces collapsed"))
    ],
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small model of one kind and its export."""
    model_type, byte_fallback, prefix, rule = request.param
    folder = tmp_path_factory.mktemp("kind")
    options = {"byte_fallback": byte_fallback, "add_dummy_prefix": prefix, "split_by_whitespace": prefix}
    model = train(folder / "t.model", model_type=model_type, **options, **normalization(folder, rule))
    return Pair(model, folder / "out")


@example(text="Abal")  # what a rule yields ("a", from "A") is no source of another ("ab")
@example(text="...e\u0301\u0323\u0301")
@given(text=TEXTS)
def test_same_ids_on_any_text(kind: Pair, text: str) -> None:
    kind.check(text)


@pytest.fixture(
    scope="module",
    params=["nmt_nfkc", *(pytest.param(name, marks=pytest.mark.full) for name in ("nfkc", "nmt_nfkc_cf", "nfkc_cf"))],
)
def named_rule(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model with one of SentencePiece's own normalizations; newlines are symbols of their own, which it keeps."""
    folder = tmp_path_factory.mktemp(request.param)
    options = {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["\n", "<ud>", "e\u0301x"]}
    model = train(folder / "t.model", normalization_rule_name=request.param, vocab_size=900, **options)
    return Pair(model, folder / "out")


@given(text=TEXTS)
def test_same_ids_under_unicode_normalization(named_rule: Pair, text: str) -> None:
    named_rule.check(text)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "prefix"])
def own_symbols(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model with user-defined symbols that overlap each other, the rules, the spaces; and control symbols."""
    folder = tmp_path_factory.mktemp("own")
    symbols = ["<ud>", "[SEP]", "\n", "\u2581\u2581", "0", "\u00e9", "e\u0301x", "<u"]
    options = {"control_symbols": ["<ctl>", "<|x|>"], "add_dummy_prefix": request.param, "byte_fallback": request.param}
    rule = normalization(folder, "rules, spaces collapsed" if request.param else "rules")
    model = train(folder / "t.model", model_type="bpe", user_defined_symbols=symbols, **options, **rule)
    return Pair(model, folder / "out")


@given(text=TEXTS)
def test_same_ids_with_symbols_of_the_users_own(own_symbols: Pair, text: str) -> None:
    own_symbols.check(text)


# What is refused before anything is written; see test_sentencepiece_to_json for the rest.


def test_a_normalization_without_equivalent_is_refused(tmp_path: Path) -> None:
    rules = {f"{chr(0x4E00 + i)}{chr(0x4E00 + j)}": chr(0x5000 + 32 * i + j) for i in range(20) for j in range(20)}
    model = train(tmp_path / "t.model", model_type="bpe", normalization_rule_tsv=str(rules_file(tmp_path, rules)))
    with pytest.raises(UserError, match=r"normalization user_defined cannot be written as tokenizer.json exactly"):
        export_tokenizer(model, tmp_path / "out", None)


@pytest.mark.parametrize("content", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x0a\xff\xff"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: (cannot read|no SentencePiece model)"):
        export_tokenizer(path, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_without_transformers_nothing_is_written_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_prune.huggingface.tokenizer_export.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs transformers to check it"):
        export_tokenizer(tmp_path / "tokenizer.model", tmp_path / "out", None)


# What is written.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like model: BPE, byte fallback, prefix, no normalization, a padding piece."""
    folder = tmp_path_factory.mktemp("small")
    return train(
        folder / "t.model", model_type="bpe", byte_fallback=True, pad_id=3, **normalization(folder, "identity")
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_a_models_config_beside_it_changes_nothing(small: Path, tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    export_tokenizer(small, tmp_path, 2048)
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN | {"config.json"}
    verify_tokenizer(small, tmp_path, CORPUS)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 2048
    named = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (0, 1, 2, 3)


def test_a_config_that_makes_transformers_pick_its_own_class_is_refused(small: Path, tmp_path: Path) -> None:
    """transformers 5 loads Qwen2Tokenizer for model_type qwen2, whatever the files say; version 4 obeys the files."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    try:
        export_tokenizer(small, tmp_path, None)
    except UserError as error:
        assert "config.json: transformers loads Qwen2Tokenizer" in str(error)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    else:
        verify_tokenizer(small, tmp_path, CORPUS)


def test_nobody_is_asked_whether_to_run_a_folders_own_code(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "cluster_llama",
        "auto_map": {"AutoConfig": "configuration_cluster_llama.ClusterLlamaConfig"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export_tokenizer(small, tmp_path, 2048)
    said = capfd.readouterr()
    assert "trust_remote_code" not in said.out + said.err
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN | {"config.json"}


def test_bos_is_added_only_when_asked_for(small: Path, tmp_path: Path) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(small))
    export_tokenizer(small, tmp_path / "without", None)
    export_tokenizer(small, tmp_path / "with", None, add_bos=True)
    without, with_bos = (AutoTokenizer.from_pretrained(str(tmp_path / name)) for name in ("without", "with"))
    ids = oracle.encode("Once upon")
    assert without("Once upon")["input_ids"] == ids
    assert with_bos("Once upon")["input_ids"] == [1, *ids]
    assert with_bos("Once upon", add_special_tokens=False)["input_ids"] == ids
    assert with_bos.decode([1, *ids, 2], skip_special_tokens=True) == "Once upon"


def test_bos_of_a_model_without_one_is_refused(tmp_path: Path) -> None:
    model = train(tmp_path / "t.model", model_type="bpe", bos_id=-1, normalization_rule_name="identity")
    with pytest.raises(UserError, match="add_bos: the tokenizer model has no bos piece"):
        export_tokenizer(model, tmp_path / "out", None, add_bos=True)


def test_special_pieces_in_text_are_text_unless_asked_for(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    assert 2 not in tokenizer("a</s>")["input_ids"]
    assert tokenizer("a</s>", split_special_tokens=False)["input_ids"][-1] == 2


def test_unigram_models_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_tokenizer(
        train(tmp_path / "t.model", model_type="unigram", normalization_rule_name="identity"), tmp_path, None
    )
    assert "a unigram model; SentencePiece adds scores in 32 bits" in caplog.text


def test_verify_names_the_first_text_that_differs(small: Path, tmp_path: Path) -> None:
    export_tokenizer(small, tmp_path, None)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"].reverse()
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"gives other ids than .* from position 0 on\), for the text 'something"):
        verify_tokenizer(small, tmp_path, ["", "\n", "something else", "anything else"])


def test_nasty_texts_hold_what_conversions_break() -> None:
    text = "\0".join(NASTY_TEXTS)
    assert "" in NASTY_TEXTS and "\0" not in "".join(NASTY_TEXTS)
    for sign in ("  ", "\t", "\r\n", "\u2581", "<s>", "<0x41>", "\U0001f600", "\u6f22", "e\u0301", "\x01"):
        assert sign in text
