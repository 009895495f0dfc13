"""A corpus out of what every Python installation carries, as JSON lines: {"name": ..., "text": ...}.

    python examples/demo/build_corpus.py --output build/demo/corpus.jsonl --megabytes 6

Three kinds of documents, none of which repeats another's text, so that validation text is never training text:

    topic/NAME        a chapter of Python's language reference, as `help()` shows it (pydoc_data.topics)
    docstrings/FILE   the docstrings of one file of the standard library, each under what it documents
    source/FILE       the same file without its docstrings

Tests, codec tables and installed packages are left out. Long ones are cut at blank lines into documents of a few
kilobytes (NAME:0, NAME:1, ...). Topics and docstrings are all taken; sources fill up the size that is asked for. The
order is that of a hash of the names: mixed, so that any split holds all kinds, and the same wherever the same Python is
installed. Files are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError

SKIPPED = {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"}
SKIPPED |= {"tests", "turtledemo"}
LEAST_BYTES = 200  # shorter texts say nothing
MOST_BYTES = 6_000  # longer ones are cut
LEAST_TOTAL = 2_000_000  # bytes; with less there is nothing to learn from


class Document(NamedTuple):
    """One text; `name` says where it comes from."""

    name: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode("utf-8"))


def library_files(library: Path) -> list[Path]:
    """The Python files of a standard library, sorted, without tests, codec tables and installed packages."""
    return sorted(
        path
        for path in library.rglob("*.py")
        if not any(part in SKIPPED or part.startswith("config-") for part in path.relative_to(library).parts)
    )


def split_file(name: str, source: str) -> Iterator[Document]:
    """The docstrings of a Python file as one document, the rest of it as another; nothing if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines: list[str | None] = list(source.split("\n"))  # as ast counts them: a form feed ends no line
    parts = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        literal = node.body[0]
        heading = name if isinstance(node, ast.Module) else (lines[node.lineno - 1] or "").strip()
        parts.append((literal.lineno, f"{heading}\n{text}"))
        # A statement stays in its place, so that what is left is still Python.
        first, last = literal.lineno - 1, literal.end_lineno or literal.lineno
        before = (lines[first] or "").encode("utf-8")[: literal.col_offset].decode("utf-8")
        lines[first:last] = [f"{before}...", *[None] * (last - first - 1)]
    yield Document(f"docstrings/{name}", "\n\n".join(text for _, text in sorted(parts)))
    yield Document(f"source/{name}", "\n".join(line.rstrip() for line in lines if line is not None).strip())


def reference() -> Mapping[str, str]:
    """The chapters of the language reference by name; none where a distribution ships Python without them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def all_documents(library: Path, topics: Mapping[str, str]) -> Iterator[Document]:
    """Every document there is, in no order that matters. Files that are no UTF-8 are left out."""
    for name, text in topics.items():
        yield Document(f"topic/{name}", text.strip())
    for path in library_files(library):
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield from split_file(path.relative_to(library).as_posix(), source)


def cut(document: Document) -> Iterator[Document]:
    """The document in pieces of at most about MOST_BYTES, cut where there are blank lines."""
    piece, count = "", 0
    for paragraph in document.text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > MOST_BYTES:
            yield Document(f"{document.name}:{count}", piece)
            piece, count = "", count + 1
        piece += f"\n\n{paragraph}" if piece else paragraph
    yield Document(f"{document.name}:{count}", piece)


def choose(documents: Iterable[Document], total_bytes: int) -> list[Document]:
    """The corpus: topics and docstrings, then sources until `total_bytes` are full, in the order of a hash.

    Pieces that say nothing (too short) and tables (long without a blank line) are left out.
    """
    pieces = (piece for document in documents for piece in cut(document))
    candidates = [piece for piece in pieces if LEAST_BYTES <= piece.size <= 2 * MOST_BYTES]
    chosen, size = [], 0
    for piece in sorted(candidates, key=lambda d: (d.name.startswith("source/"), _hash(f"choose {d.name}"))):
        if not piece.name.startswith("source/") or size + piece.size <= total_bytes:
            chosen.append(piece)
            size += piece.size
    return sorted(chosen, key=lambda d: _hash(f"order {d.name}"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class CorpusOptions:
    """Its options."""

    output: str = option(None, "JSON lines to write", metavar="FILE", required=True)
    megabytes: float = option(6.0, "size aimed at")


def build(arguments: CorpusOptions) -> int:
    """Write the corpus; the exit status. Raises UserError."""
    library, output = Path(sysconfig.get_paths()["stdlib"]), Path(arguments.output)
    corpus = choose(all_documents(library, reference()), int(arguments.megabytes * 1e6))
    size = sum(document.size for document in corpus)
    if size < LEAST_TOTAL:
        raise UserError(f"{library} holds only {size:,} bytes of text: are its sources there?")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in corpus)
    kinds = Counter(document.name.partition("/")[0] for document in corpus)
    counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
    print(f"{output}: {size:,} bytes in {len(corpus):,} documents ({counts})")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("build_corpus.py", CorpusOptions, build, argv, about="A corpus out of Python's own texts.")


if __name__ == "__main__":
    sys.exit(main())
