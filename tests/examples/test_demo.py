"""The demo's own parts: what its corpus holds, the tokenizer that is trained on it, the table it ends with.

The whole demo takes minutes and is run by `make demo`; its two configurations are checked here.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path

import pytest

from megatron_prune.config import load_config
from megatron_prune.config.validation import validate
from megatron_prune.data.tokenizer import SentencePieceTokenizer
from megatron_prune.huggingface.config import read_shape
from megatron_prune.model.architecture import Architecture
from tests.scripts import load_script

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
MODULE = '''"""What the module is for.

More of it.
"""
import os
\x0c
class Thing:
    """A thing: ä."""

    def size(self):
        """How large."""
        return 1  # a comment

    def empty(self): "nothing"

TEXT = """no docstring"""
'''


build_corpus, train_tokenizer, report = (
    load_script(DEMO / f"{name}.py") for name in ("build_corpus", "train_tokenizer", "report")
)


def test_docstrings_and_source_of_a_file_share_no_text() -> None:
    docstrings, source = build_corpus.split_file("pkg/module.py", MODULE)
    assert docstrings.name == "docstrings/pkg/module.py"
    assert docstrings.text.split("\n\n") == [
        "pkg/module.py\nWhat the module is for.",
        "More of it.",
        "class Thing:\nA thing: ä.",
        "def size(self):\nHow large.",
        'def empty(self): "nothing"\nnothing',
    ]
    tree = ast.parse(source.text)  # still Python, with the same definitions
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert names == ["Thing", "size", "empty"]
    for text in ("What the module", "A thing", "How large", "nothing"):
        assert text not in source.text
    assert "# a comment" in source.text
    assert 'TEXT = """no docstring"""' in source.text


def test_a_file_that_is_no_python_gives_nothing() -> None:
    assert list(build_corpus.split_file("template.py", "def {name}(")) == []


def test_long_documents_are_cut_at_blank_lines_and_lose_nothing() -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(50))
    pieces = list(build_corpus.cut(build_corpus.Document("topic/long", text)))
    assert len(pieces) > 3
    assert "\n\n".join(piece.text for piece in pieces) == text
    assert all(piece.size <= build_corpus.MOST_BYTES for piece in pieces)
    assert len({piece.name for piece in pieces}) == len(pieces)


def test_corpus_holds_all_prose_and_as_much_source_as_fits_in_an_order_of_its_own() -> None:
    def document(name: str, size: int) -> object:
        return build_corpus.Document(name, "x" * size)

    prose = [document(f"{kind}/{i}", 1000) for kind in ("topic", "docstrings") for i in range(10)]
    source = [document(f"source/{i}", 1000) for i in range(40)]
    useless = [document("topic/short", 20), document("source/table", 50_000)]
    chosen = build_corpus.choose([*prose, *source, *useless], total_bytes=35_500)
    kinds = [piece.name.partition("/")[0] for piece in chosen]
    assert (kinds.count("topic"), kinds.count("docstrings"), kinds.count("source")) == (10, 10, 15)
    assert chosen == build_corpus.choose([*useless, *reversed(source), *prose], total_bytes=35_500)
    # Mixed: whatever is split off the end for validation holds source and prose.
    assert len(set(kinds[-12:])) > 1 and len(set(kinds[:12])) > 1


def test_library_files_leave_out_tests_and_installed_packages(tmp_path: Path) -> None:
    for name in ("a.py", "json/tool.py", "test/test_a.py", "site-packages/x.py", "config-3.11/y.py", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = [path.relative_to(tmp_path).as_posix() for path in build_corpus.library_files(tmp_path)]
    assert found == ["a.py", "json/tool.py"]


def test_a_python_without_its_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert build_corpus.main(["--output", str(tmp_path / "out" / "corpus.jsonl")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokenizer_keeps_spaces_line_breaks_and_unseen_characters(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [piece.text for name in ("json", "logging") for piece in _pieces(library / name / "__init__.py")]
    corpus, model = tmp_path / "corpus.jsonl", tmp_path / "tokenizer.model"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert train_tokenizer.main(["--corpus", str(corpus), "--output", str(model), "--vocab-size", "512"]) == 0
    tokenizer = SentencePieceTokenizer(str(model), model)
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (512, 1, 2)
    text = "    def f(self):\n\n        return  'ä東'  # two  spaces\n\tx"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def _pieces(path: Path) -> list[build_corpus.Document]:
    return list(build_corpus.split_file(path.name, path.read_text(encoding="utf-8")))


def test_table_shows_what_the_two_runs_measured() -> None:
    def stage(parameters: int, tokens: int, heads: int, loss: float) -> dict[str, object]:
        return {
            "parameters": parameters,
            "tokens": tokens,
            "widths": {"head": heads, "kv_head": [heads // 2, 1], "ffn": 30, "stem": 20},
            "validation_loss": loss,
            "evaluation_tokens_per_second": 12345.6,
        }

    stages = {"source": stage(2000, 0, 8, 4.0), "pruned": stage(1000, 50, 4, 4.5), "final": stage(1000, 90, 4, 3.9)}
    rows = report.table({"consumed_tokens": 1000}, {"stages": stages})
    assert rows[1] == ("source", "2,000", "8 (4)", "30", "20", "1,000", "4.000", "12,346")
    assert rows[2] == ("right after pruning", "1,000", "4 (2)", "30", "20", "1,050", "4.500", "12,346")
    assert [row[-3:-1] for row in rows[2:]] == [("1,050", "4.500"), ("1,090", "3.900")]
    lines = report.markdown(rows).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1  # columns line up
    assert all(line.count("|") == len(rows[0]) + 1 for line in lines)
    with pytest.raises(KeyError, match="final"):
        report.table({"consumed_tokens": 1000}, {"stages": {k: stages[k] for k in ("source", "pruned")}})


def test_machine_names_its_cores() -> None:
    assert " core" in report.machine()


@pytest.mark.parametrize("name", ["pretrain", "prune"])
def test_configurations_fit_two_processes(name: str) -> None:
    config = load_config(["--config", str(DEMO / f"{name}.yaml")])
    validate(config, world_size=2)
    shape = read_shape(DEMO / "model")
    assert config.data.seq_length <= shape.max_position_embeddings
    if name == "prune":
        assert config.pruning.target_params == Architecture.full(shape).parameters // 2
