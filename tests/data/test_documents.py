"""Files become documents, and every mistake in them is reported with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_prune.data.documents import check_inputs, read_documents
from megatron_prune.errors import UserError

TEXT = "\n  one\ntwo  \n\n \t\nthree\n\n\nfour \n"


def texts(*paths: Path, **options: str) -> list[str]:
    return [document.text for document in read_documents([str(path) for path in paths], **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("blank-line", ["  one\ntwo", "three", "four"]),
        ("line", ["  one", "two", "three", "four"]),
        ("file", ["  one\ntwo  \n\n \t\nthree\n\n\nfour"]),
    ],
)
def test_separators_cut_text(tmp_path: Path, separator: str, expected: list[str]) -> None:
    assert texts(write(tmp_path / "a.txt", TEXT), separator=separator) == expected


def test_documents_know_their_line_and_how_much_was_read(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", TEXT), write(tmp_path / "b.jsonl", '\n{"text": "five"}\n')
    found = list(read_documents([str(first), str(second)]))
    assert [(Path(document.path).name, document.line) for document in found] == [
        ("a.txt", 2),
        ("a.txt", 6),
        ("a.txt", 9),
        ("b.jsonl", 2),
    ]
    sizes = [document.disk_bytes for document in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] == check_inputs([str(first), str(second)])


def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert texts(windows) == texts(write(tmp_path / "u.txt", TEXT))


def test_json_strings_are_taken_as_they_are(tmp_path: Path) -> None:
    lines = [" a\n\nb ", "", "\u6771\U0001f642"]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"body": line, "n": 1}) for line in lines))
    assert texts(path, json_key="body") == lines


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_gzip_is_seen_from_the_content(tmp_path: Path, name: str) -> None:
    content = json.dumps({"text": "one"}) if name.endswith("jsonl") else TEXT
    plain = write(tmp_path / name, content)
    packed = write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))
    assert texts(packed) == texts(plain)
    misnamed = write(tmp_path / f"other_{name}", gzip.compress(content.encode()))
    assert texts(misnamed) == texts(plain)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl:2: is no JSON"),
        ('\n["a"]\n', r"a\.jsonl:2: expected a JSON object on every line, got list"),
        ('{"body": "a", "id": 1}', r'a\.jsonl:1: has no key "text" \(keys: body, id\); choose one with --json-key'),
        ('{"text": 3}', r'a\.jsonl:1: "text" holds no string but int'),
        ('{"text": "\\ud83d"}', r"a\.jsonl:1: holds half of a surrogate pair"),
        (b'{"text": "a"}\n\xff\xfe', r"a\.jsonl:2: is no UTF-8 text"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        texts(write(tmp_path / "a.jsonl", content))


def test_damaged_gzip_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode() * 100)
    with pytest.raises(UserError, match=r"cut\.gz: the gzip file is damaged or cut short"):
        texts(write(tmp_path / "cut.gz", whole[: len(whole) // 2]))
    with pytest.raises(UserError, match=r"bad\.gz: the gzip file is damaged or cut short"):
        texts(write(tmp_path / "bad.gz", whole[:20] + b"\xff" * 20 + whole[40:]))


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input: .*nowhere\.txt cannot be read: No such file"):
        check_inputs([str(tmp_path / "nowhere.txt")])
    with pytest.raises(UserError, match=r"--input: .* is a folder"):
        check_inputs([str(tmp_path)])
    with pytest.raises(UserError, match="--input: no file"):
        check_inputs([])
    with pytest.raises(UserError, match='--document-separator: "page" is unknown'):
        texts(write(tmp_path / "a.txt", TEXT), separator="page")
