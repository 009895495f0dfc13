"""Tokenizers laid out as real models' are, from training ids to export and GGUF; transformers' AutoTokenizer judges.

What is compared: ids of real text with added tokens inside, special ids, padding side, what the chat templates render.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: the extra hf")

from transformers import AutoTokenizer

from megatron_prune.data.tokenizer import build_tokenizer, check_rows
from megatron_prune.data.tokenizer_files import HUGGING_FACE, SENTENCEPIECE, find_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.chat import render_chats
from megatron_prune.huggingface.gguf_tokenizer import Vocabulary, read_vocabulary
from megatron_prune.huggingface.tokenizer_copy import compare_tokenizers, copy_tokenizer
from megatron_prune.huggingface.tokenizer_export import NASTY_TEXTS, export_tokenizer

from .tokenizer_layouts import CHATML, LAYOUTS, TOOLS, VICUNA, byte_level, write

ESCAPES = (
    "{{{{ cycler.__init__.__globals__.os.system('{0}') }}}}",
    "{{{{ lipsum.__globals__['os'].popen('{0}').read() }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ undefined_there.{0} }}}}",
    "{{{{ ('{{0.__class__.__init__.__globals__}}'|attr('format'))(messages) }}}}{{{{ raise_exception('{0}') }}}}",
)
BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
)

ROWS = 520
CHAT = [{"role": "user", "content": "Once upon\n"}, {"role": "assistant", "content": " a time."}]
FOLLOWS_TRANSFORMERS_5 = int(__import__("transformers").__version__.partition(".")[0]) >= 5


@pytest.fixture(scope="module")
def text(real_data: Path) -> Path:
    return real_data / "text" / "tinyshakespeare.txt"


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, stories260k: Path, text: Path, tmp_path_factory: Any) -> Path:
    """A folder of one layout, with a config.json of its kind."""
    return make(request.param, tmp_path_factory.mktemp("layout") / request.param, stories260k, text)


def make(name: str, folder: Path, stories260k: Path, text: Path) -> Path:
    folder.mkdir(parents=True)
    model_type = {"qwen": "qwen2", "zephyr": "mistral"}.get(name, "llama")
    write(folder, {"config.json": {"model_type": model_type, "vocab_size": ROWS, "eos_token_id": 2}})
    LAYOUTS[name](folder, stories260k / "tokenizer.model", text)
    return folder


def texts_of(library: Any, text: Path) -> list[str]:
    """Awkward texts, paragraphs of a real one, and some of these with added tokens at random places."""
    paragraphs = text.read_text(encoding="utf-8")[:40_000].split("\n\n")
    added = [token.content for token in library.added_tokens_decoder.values()]
    draw = random.Random(0)
    marked = []
    for number, token in enumerate(added * 4):
        paragraph = paragraphs[number]
        place = draw.randrange(len(paragraph) + 1)
        marked.append(paragraph[:place] + token + paragraph[place:] + draw.choice(["", " ", "\n"]) + token)
    return [*NASTY_TEXTS, *paragraphs, *marked]


def facts(folder: Path, texts: list[str]) -> dict[str, Any]:
    """All that must arrive, as AutoTokenizer sees a folder."""
    library = AutoTokenizer.from_pretrained(str(folder))
    templates = library.chat_template
    named = templates if isinstance(templates, dict) else {"default": templates} if templates else {}
    return {
        "ids": [library(one, add_special_tokens=False)["input_ids"] for one in texts],
        "begun": library("a")["input_ids"],
        "special": (library.bos_token_id, library.eos_token_id, library.unk_token_id, library.pad_token_id),
        "padding": (library.padding_side, library.truncation_side),
        "chats": {
            name: library.apply_chat_template(CHAT, chat_template=one, tokenize=False, add_generation_prompt=True)
            for name, one in named.items()
        },
    }


def test_training_ids_are_those_of_auto_tokenizer(layout: Path, text: Path) -> None:
    library = AutoTokenizer.from_pretrained(str(layout))
    tokenizer = build_tokenizer(None, str(layout))
    assert tokenizer.kind == HUGGING_FACE
    texts = texts_of(library, text)
    assert [tokenizer.tokenize(one) for one in texts] == [
        library(one, add_special_tokens=False)["input_ids"] for one in texts
    ]
    assert (tokenizer.eod, tokenizer.vocab_size) == (library.eos_token_id, len(library))
    assert tokenizer.bos == library.bos_token_id


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "own code"])
def test_export_reads_as_its_source(layout: Path, model_type: str, text: Path, tmp_path: Path) -> None:
    """Whatever class transformers picks for the exported model's type."""
    config = {"model_type": model_type}
    if model_type == "own code":
        config = {"model_type": "cluster_llama", "auto_map": {"AutoConfig": "absent.Config"}}
    write(tmp_path, {"config.json": config})
    place = find_tokenizer(layout)
    copy_tokenizer(place, tmp_path)
    texts = texts_of(AutoTokenizer.from_pretrained(str(layout)), text)
    expected = facts(layout, texts)
    if layout.name == "llama2":  # where only processors look; tokenizers of the export find it
        expected["chats"] = {"default": "<|user|>\nOnce upon\n</s>\n<|assistant|>\n a time.</s>\n<|assistant|>"}
    assert facts(tmp_path, texts) == expected
    assert compare_tokenizers(place, tmp_path, texts[:50]).keys() == expected["chats"].keys()
    assert not {"tokenizer.py", "model.safetensors"} & {file.name for file in tmp_path.iterdir()}


def test_gguf_has_all_of_it(layout: Path) -> None:
    library = AutoTokenizer.from_pretrained(str(layout))
    found = read_vocabulary(layout, ROWS)
    assert found.tokens[: len(library)] == library.convert_ids_to_tokens(range(len(library)))
    assert found.tokens[len(library) :] == [f"[PAD{number}]" for number in range(len(library), ROWS)]
    for number, token in library.added_tokens_decoder.items():
        if number != library.unk_token_id:
            assert found.types[number] == (3 if token.special else 4), token
    named = {name: getattr(library, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    assert {name: found.special.get(name) for name in named} == named
    assert found.add_bos == (library("a")["input_ids"][0] == library.bos_token_id)
    templates = {"default": found.chat_template} if isinstance(found.chat_template, str) else found.chat_template
    if isinstance(templates, list):
        templates = {one["name"]: one["template"] for one in templates}
    expected = library.chat_template if isinstance(library.chat_template, dict) else {"default": library.chat_template}
    if layout.name == "llama2":
        assert templates and templates["default"].startswith("{% for m in messages %}")
    else:
        assert templates == (expected if library.chat_template else None)


# A SentencePiece-like tokenizer.json alone ----------------------------------------------------------------------------


def test_scores_worked_out_from_merges_give_the_same_ids(stories260k: Path, text: Path, tmp_path: Path) -> None:
    """llama.cpp splits as SentencePiece does, by the scores in the file; run by SentencePiece itself on real text."""
    folder = make("resaved", tmp_path / "resaved", stories260k, text)
    assert not (folder / "tokenizer.model").exists()
    library, processor = AutoTokenizer.from_pretrained(str(folder)), as_sentencepiece(read_vocabulary(folder, 512))
    texts = [*text.read_text(encoding="utf-8")[:300_000].split("\n"), *NASTY_TEXTS]
    assert [processor.encode(one) for one in texts] == [library(one)["input_ids"] for one in texts]


def as_sentencepiece(found: Vocabulary) -> Any:
    """The vocabulary of a GGUF file as SentencePiece reads one."""
    from sentencepiece import SentencePieceProcessor

    from megatron_prune.huggingface.sentencepiece_model import PieceKind, SentencePieceModel, SpmPiece, write_model

    assert found.scores is not None
    pieces = tuple(SpmPiece(*one, PieceKind(kind)) for *one, kind in zip(found.tokens, found.scores, found.types))
    unigram = found.model == "t5"
    model = SentencePieceModel(
        pieces=pieces, model_type="unigram" if unigram else "bpe", byte_fallback=not unigram,
        treat_whitespace_as_suffix=False, unk_surface=" ", bos="<s>", eos="</s>", pad=None, normalizer_name="",
        charsmap=found.charsmap, add_dummy_prefix=bool(found.add_space_prefix),
        remove_extra_whitespaces=bool(found.remove_extra_whitespaces), escape_whitespaces=True, has_denormalizer=False,
    )  # fmt: skip
    return SentencePieceProcessor(model_proto=write_model(model))


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False},
    ],
    ids=["unigram", "plain_unigram", "bpe_without_prefix"],
)  # fmt: skip
def test_our_exports_saved_again_map_to_gguf(options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=500, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, input_sentence_size=3000, **options,
    )  # fmt: skip
    export_tokenizer(tmp_path / "m.model", tmp_path / "first", None)
    AutoTokenizer.from_pretrained(str(tmp_path / "first")).save_pretrained(str(tmp_path / "again"))
    (tmp_path / "again" / "tokenizer.model").unlink(missing_ok=True)
    write(tmp_path, {"first/config.json": {"model_type": "llama"}, "again/config.json": {"model_type": "llama"}})
    whole, derived = (read_vocabulary(tmp_path / name, ROWS) for name in ("first", "again"))
    assert derived.tokens == whole.tokens and derived.types == whole.types and derived.special == whole.special
    assert (derived.model, derived.add_space_prefix, derived.charsmap) == (
        whole.model, whole.add_space_prefix, whole.charsmap,
    )  # fmt: skip
    assert derived.remove_extra_whitespaces == whole.remove_extra_whitespaces
    if options["model_type"] == "unigram":
        assert derived.scores == pytest.approx(whole.scores)
    else:
        one, two = as_sentencepiece(derived), as_sentencepiece(whole)
        for line in text.read_text(encoding="utf-8")[:100_000].split("\n"):
            assert one.encode(line) == two.encode(line)


def test_a_tokenizer_json_that_no_sentencepiece_model_gives_is_refused(
    stories260k: Path, text: Path, tmp_path: Path
) -> None:
    folder = make("resaved", tmp_path / "resaved", stories260k, text)
    content = json.loads((folder / "tokenizer.json").read_text())
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    assert ("\u2581t", "he") in merges
    changes: dict[str, dict[str, Any]] = {
        "the order of its merges": {"model": content["model"] | {"merges": [("\u2581th", "e"), *merges]}},  # two ways
        "it does not merge": {"model": content["model"] | {"merges": merges[:-100]}},
        "its normalizer or pre_tokenizer": {"normalizer": {"type": "Lowercase"}},
    }
    for words, change in changes.items():
        write(folder, {"tokenizer.json": content | change})
        with pytest.raises(UserError, match=words):
            read_vocabulary(folder, ROWS)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_merges_is_refused_or_split_alike(
    seed: int, stories260k: Path, text: Path, tmp_path: Path
) -> None:
    folder = make("resaved", tmp_path / "resaved", stories260k, text)
    content = json.loads((folder / "tokenizer.json").read_text())
    merges, draw = content["model"]["merges"], random.Random(seed)
    for _ in range(1 + 10 * seed):
        place = draw.randrange(len(merges) - 1)
        merges[place : place + 2] = merges[place : place + 2][::-1]
    write(folder, {"tokenizer.json": content})
    try:
        found = read_vocabulary(folder, ROWS)
    except UserError as error:
        assert seed and "maps to no SentencePiece model" in str(error)
        return
    processor, library = as_sentencepiece(found), AutoTokenizer.from_pretrained(str(folder))
    for line in text.read_text(encoding="utf-8")[:100_000].split("\n"):
        assert processor.encode(line) == library(line)["input_ids"]


# Which file wins ------------------------------------------------------------------------------------------------------


def test_a_foreign_tokenizer_model_beside_tokenizer_json_is_not_looked_at(
    stories260k: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = make("llama3", tmp_path / "alone", stories260k, text)
    both = shutil.copytree(alone, tmp_path / "both")
    shutil.copyfile(stories260k / "tokenizer.model", both / "tokenizer.model")
    one, two = build_tokenizer(None, str(alone)), build_tokenizer(None, str(both))
    assert one.unique_identifiers == two.unique_identifiers and one.tokenize("the king") == two.tokenize("the king")
    assert read_vocabulary(alone, ROWS) == read_vocabulary(both, ROWS)
    copy_tokenizer(find_tokenizer(both), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert "holds other tokens than tokenizer.json" in caplog.text
    # One that belongs goes along.
    copy_tokenizer(find_tokenizer(make("vicuna", tmp_path / "v", stories260k, text)), tmp_path / "out2")
    assert (tmp_path / "out2" / "tokenizer.model").read_bytes() == (stories260k / "tokenizer.model").read_bytes()


def test_a_bare_file_is_sentencepiece_s_and_one_with_settings_is_not(stories260k: Path, tmp_path: Path) -> None:
    shutil.copyfile(stories260k / "tokenizer.model", tmp_path / "tokenizer.model")
    assert find_tokenizer(tmp_path).kind == SENTENCEPIECE
    write(tmp_path, {"chat_template.jinja": TOOLS})
    assert find_tokenizer(tmp_path).kind == HUGGING_FACE
    assert find_tokenizer(tmp_path, SENTENCEPIECE).kind == SENTENCEPIECE


def test_a_model_file_named_by_itself_must_not_lose_tokens(stories260k: Path, text: Path, tmp_path: Path) -> None:
    folder = make("chatml", tmp_path / "chatml", stories260k, text)
    with pytest.raises(
        UserError, match=r"lacks tokens that its folder adds \('<\|im_end\|>' and more\); name the folder"
    ):
        build_tokenizer(None, str(folder / "tokenizer.model"))
    assert build_tokenizer(SENTENCEPIECE, str(folder / "tokenizer.model")).eod == 2
    assert build_tokenizer(None, str(stories260k / "tokenizer.model")).eod == 2


def test_a_file_with_a_name_of_its_own(stories260k: Path, text: Path, tmp_path: Path) -> None:
    folder = make("llama3", tmp_path / "llama3", stories260k, text)
    (folder / "tokenizer.json").rename(folder / "mine.json")
    byte_level(text, ["<other>"], None, 300).save(str(folder / "tokenizer.json"))
    mine = build_tokenizer(None, str(folder / "mine.json"))
    assert mine.vocab_size == 506 and mine.detokenize([mine.eod]) == "<|eot_id|>"
    copy_tokenizer(find_tokenizer(folder / "mine.json"), tmp_path / "out")
    library = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert library("the king")["input_ids"][1:] == mine.tokenize("the king") and library.eos_token_id == mine.eod


def test_fingerprint_is_the_file_s_and_tells_added_tokens(stories260k: Path, text: Path, tmp_path: Path) -> None:
    folder = make("chatml", tmp_path / "chatml", stories260k, text)
    before = build_tokenizer(None, str(folder)).fingerprint
    assert before == build_tokenizer(None, str(shutil.copytree(folder, tmp_path / "moved"))).fingerprint
    write(folder, {"added_tokens.json": {"<|im_end|>": 512, "<|im_start|>": 513, "<tool>": 514}})
    assert build_tokenizer(None, str(folder)).fingerprint != before


# Chat templates and ends of text --------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "a string": {"tokenizer_config.json": {"chat_template": CHATML}},
    "a list": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": TOOLS}]
        }
    },
    "a list without default": {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": TOOLS}]}},
    "chat_template.json": {"chat_template.json": {"chat_template": CHATML}},
    "a file that wins": {"chat_template.jinja": CHATML, "tokenizer_config.json": {"chat_template": TOOLS}},
    "files": {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": TOOLS},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", ["sentencepiece", "byte_level"])
def test_chat_templates_in_every_form(form: str, base: str, stories260k: Path, text: Path, tmp_path: Path) -> None:
    if "additional" in str(FORMS[form]) and not FOLLOWS_TRANSFORMERS_5:
        pytest.skip("transformers 5 reads additional_chat_templates")
    source, target = tmp_path / "source", tmp_path / "target"
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if base == "sentencepiece":
        write(source, FORMS[form])
        shutil.copyfile(stories260k / "tokenizer.model", source / "tokenizer.model")
    else:
        files = dict(FORMS[form])
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **files.pop("tokenizer_config.json", {})}
        write(source, {"tokenizer_config.json": config, **files})
        byte_level(text, ["<s>", "</s>", "<unk>"], None, 300).save(str(source / "tokenizer.json"))
    write(target, {"config.json": {"model_type": "mistral"}})
    write(source, {"config.json": {"model_type": "llama"}})
    copy_tokenizer(find_tokenizer(source), target)
    names = {"a list": {"default", "rag"}, "files": {"default", "rag"}, "a list without default": {"rag"}}
    library = AutoTokenizer.from_pretrained(str(target))
    templates = library.chat_template if isinstance(library.chat_template, dict) else {"default": library.chat_template}
    assert templates == {name: CHATML if name == "default" else TOOLS for name in names.get(form, {"default"})}
    found = read_vocabulary(source, ROWS).chat_template
    assert found == (
        CHATML if set(templates) == {"default"} else [{"name": n, "template": t} for n, t in templates.items()]
    )


def test_templates_are_rendered_and_refusals_compared(stories260k: Path, text: Path, tmp_path: Path) -> None:
    folder = make("vicuna", tmp_path / "vicuna", stories260k, text)
    library = AutoTokenizer.from_pretrained(str(folder))
    told = render_chats(library, {"default": VICUNA})["default"]
    assert "<s>USER: Once upon a time <b>&</b>" in told and "no system messages" in told
    assert render_chats(library, {"default": VICUNA.replace(": ", ":")})["default"] != told
    mark = tmp_path / "ran"
    for escape in ESCAPES:
        told = json.loads(render_chats(library, {"default": escape.format(f"touch {mark}")})["default"])
        assert all("Error" in text for text in told), told
    assert not mark.exists()
    for bomb in BOMBS:
        with pytest.raises(UserError, match="needs more than 1 s or 64 MiB"):
            render_chats(library, {"default": bomb}, 1, 64 << 20)
    copy_tokenizer(find_tokenizer(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    write(tmp_path / "out", {"tokenizer_config.json": config | {"chat_template": TOOLS}})
    with pytest.raises(UserError, match="its chat templates differ"):
        compare_tokenizers(find_tokenizer(folder), tmp_path / "out", ["a"])


def test_ends_of_text_that_disagree_are_all_kept(stories260k: Path, text: Path, tmp_path: Path) -> None:
    from megatron_prune.huggingface.config import read_shape
    from megatron_prune.huggingface.export import export
    from megatron_prune.huggingface.source_facts import read_source
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config

    folder = make("llama3", tmp_path / "llama3", stories260k, text)
    config = tiny_config(vocab_size=ROWS, num_hidden_layers=1) | {"eos_token_id": [501, 505], "bos_token_id": 500}
    write(folder, {"config.json": config})
    weights = random_llama_weights(config)
    done = export(
        weights.__getitem__, Architecture.full(read_shape(folder)), tmp_path / "out", tokenizer_model=str(folder),
        source=read_source(folder),
    )  # fmt: skip
    written = {name: json.loads((done.folder / name).read_text()) for name in ("config.json", "generation_config.json")}
    assert written["config.json"]["eos_token_id"] == [501, 505]
    assert written["generation_config.json"]["eos_token_id"] == [501, 504, 505]
    assert AutoTokenizer.from_pretrained(str(done.folder)).eos_token_id == 505
    assert build_tokenizer(None, str(done.folder)).eod == 505
    special = read_vocabulary(done.folder, ROWS).special
    assert special["eos"] == 505 and "eot" not in special  # llama.cpp knows the others by name
    write(done.folder, {"generation_config.json": {"eos_token_id": [7, 505]}})
    assert read_vocabulary(done.folder, ROWS).special["eot"] == 7


# One id too many ------------------------------------------------------------------------------------------------------


def test_a_token_without_a_row_is_told_and_left_out_of_gguf(
    stories260k: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make("vicuna", tmp_path / "vicuna", stories260k, text)
    with pytest.raises(
        UserError, match=r"513 ids, the model 512: there is no row for id 512 \('<pad>'\).*--resize-vocab"
    ):
        check_rows(build_tokenizer(None, str(folder)), 512)
    with pytest.raises(UserError, match="use the model's own tokenizer"):
        check_rows(build_tokenizer(None, str(folder)), 100)
    found = read_vocabulary(folder, 512)
    assert len(found.tokens) == len(found.types) == len(found.scores or []) == 512 and "pad" not in found.special
    assert "has no rows for '<pad>'" in caplog.text
    with pytest.raises(UserError, match="its tokenizer has 513 ids, the model 511"):
        read_vocabulary(folder, 511)


def test_a_token_in_the_place_of_a_byte_is_refused(stories260k: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stories260k, tmp_path / "model"))
    write(folder, {"tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<zz>", "special": True}}}})
    with pytest.raises(UserError, match="SentencePiece does not take its vocabulary .*256 byte pieces"):
        read_vocabulary(folder, 512)


def test_new_rows_are_the_mean_and_change_no_other_logit(stories260k: Path) -> None:
    from megatron_prune.huggingface.config import read_shape
    from megatron_prune.huggingface.resize import resized, with_rows
    from megatron_prune.huggingface.weights import FolderWeights
    from megatron_prune.model.architecture import Architecture

    weights, full = FolderWeights(stories260k), Architecture.full(read_shape(stories260k))
    name = "model.embed_tokens.weight"
    before, after = weights(name), with_rows(weights, full.table, 514)(name)
    assert after.shape == (514, 64) and after.dtype == before.dtype and torch.equal(after[:512], before)
    assert torch.equal(after[512], after[513])
    assert torch.allclose(after[512].double(), before.double().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(with_rows(weights, full.table, 514)("model.norm.weight"), weights("model.norm.weight"))
    assert resized(full, 514).parameters == full.parameters + 2 * 64  # tied


# No code, no surprises ------------------------------------------------------------------------------------------------


def test_code_in_the_folder_is_never_run(stories260k: Path, text: Path, tmp_path: Path) -> None:
    folder = make("chatml", tmp_path / "chatml", stories260k, text)
    marker = tmp_path / "ran"
    write(folder, {"mine.py": f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Tok: pass\n"})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, {"tokenizer_config.json": config | {"auto_map": {"AutoTokenizer": ["mine.Tok", None]}}})
    for act in (build_tokenizer, lambda _, path: read_vocabulary(Path(path), ROWS)):
        with pytest.raises(UserError, match="auto_map asks for code outside transformers"):
            act(None, str(folder))
    # A model's own code is no matter of its tokenizer.
    write(folder, {"tokenizer_config.json": config})
    write(folder, {"config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}})
    assert build_tokenizer(None, str(folder)).eod == 512
    assert not marker.exists()


@pytest.mark.skipif(not FOLLOWS_TRANSFORMERS_5, reason="classes of transformers 5 do so")
def test_a_class_that_reads_the_file_wrongly_is_refused(text: Path, tmp_path: Path) -> None:
    """LlamaTokenizer puts a prefix and drops normalization, whatever tokenizer.model says."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=500, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, num_threads=1, minloglevel=2, input_sentence_size=3000,
    )  # fmt: skip
    write(
        tmp_path,
        {"config.json": {"model_type": "llama"}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    )
    with pytest.raises(UserError, match=rf"reads tokenizer.model as LlamaTokenizer.*--tokenizer-type {SENTENCEPIECE}"):
        build_tokenizer(None, str(tmp_path))
    assert build_tokenizer(SENTENCEPIECE, str(tmp_path)).kind == SENTENCEPIECE


@pytest.mark.skipif(not FOLLOWS_TRANSFORMERS_5, reason="classes of transformers 5 do so")
def test_a_class_with_a_preparation_of_its_own_is_told(
    stories260k: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make("llama2", tmp_path / "llama2", stories260k, text)
    with caplog.at_level(logging.WARNING):
        build_tokenizer(None, str(folder))
    assert "transformers reads it as LlamaTokenizer, which takes text such as '  two' in another way" in caplog.text
    caplog.clear()
    build_tokenizer(None, str(make("llama3", tmp_path / "llama3", stories260k, text)))
    assert not caplog.text


WRONG = (None, -1, 2**40, 1.5, "", "<s>", "\ud800", [], {}, [None], {"a": 1}, {"content": 5}, [{"name": "x"}], "{% for")


def mutated(value: Any, draw: random.Random) -> Any:
    """The same JSON with something wrong somewhere."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        value = value.copy()
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value[key] = mutated(value[key], draw)
        return value
    return draw.choice(WRONG)


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_settings_of_wrong_types_are_one_line(count: int, stories260k: Path, text: Path, tmp_path: Path) -> None:
    folders = [make(name, tmp_path / name, stories260k, text) for name in ("vicuna", "zephyr", "llama3", "qwen")]
    draw, refused = random.Random(count), 0
    for number in range(count):
        folder = Path(shutil.copytree(folders[number % 4], tmp_path / "tried"))
        file = draw.choice([one for one in folder.iterdir() if one.suffix == ".json" and one.name != "config.json"])
        write(folder, {file.name: json.dumps(mutated(json.loads(file.read_text()), draw))})
        write(tmp_path / "out", {"config.json": {"model_type": "llama"}})
        try:
            build_tokenizer(None, str(folder))
            copy_tokenizer(find_tokenizer(folder), tmp_path / "out")
            read_vocabulary(folder, ROWS)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out")
    assert 0 < refused < count
