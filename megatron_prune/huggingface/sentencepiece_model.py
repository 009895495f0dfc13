"""What a SentencePiece `.model` file says: its pieces and the options its tokenization depends on.

`read_model` reads the file (a protocol buffer, `ModelProto` of SentencePiece's sentencepiece_model.proto) into a
`SentencePieceModel`; `write_model` makes such bytes of one. The few fields wanted are read by hand: the generated
protobuf modules that sentencepiece and transformers each carry may disagree about the schema, and two of them in one
process is an error.
"""

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prune.errors import UserError, first_line
from megatron_prune.reading import read_content

SPACE = "\u2581"
"""SentencePiece's sign for a space in pieces and in normalized text: LOWER ONE EIGHTH BLOCK."""

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class PieceKind(enum.IntEnum):
    """What a piece is for, by the number that a `.model` file has for it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SpmPiece(NamedTuple):
    """One entry of the vocabulary; its id is its position. `score` is the file's float32."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """A tokenizer model: pieces in order of their ids, and the options that act when text is encoded or decoded.

    `charsmap` is the compiled normalization table (empty: identity), `normalizer_name` the rule it was built from, for
    messages. `unk_surface` is what an unknown piece decodes to. `bos`, `eos` and `pad` are the texts of these control
    pieces, None where the model has none.
    """

    pieces: tuple[SpmPiece, ...]
    model_type: str
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    unk_surface: str
    bos: str | None
    eos: str | None
    pad: str | None
    normalizer_name: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    has_denormalizer: bool

    def texts(self, *kinds: PieceKind) -> list[str]:
        """Texts of the pieces of these kinds, in order of their ids."""
        return [piece.text for piece in self.pieces if piece.kind in kinds]

    @property
    def reserved(self) -> list[str]:
        """Texts of the pieces that no text is ever encoded to by its characters: unknown, control and byte pieces."""
        return self.texts(PieceKind.UNKNOWN, PieceKind.CONTROL, PieceKind.BYTE)

    @property
    def unknown(self) -> str:
        """The text of the unknown piece; SentencePiece demands exactly one."""
        return self.texts(PieceKind.UNKNOWN)[0]


def read_model(path: Path) -> SentencePieceModel:
    """Read a SentencePiece `.model` file.

    Raises UserError if the file is missing or is no SentencePiece model.
    """
    try:
        data = read_content(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer model ({error.strerror})") from error
    try:
        model = _model(data)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise UserError(f"{path}: no SentencePiece model ({error})") from error
    unknown = len(model.texts(PieceKind.UNKNOWN))
    if unknown != 1:
        raise UserError(f"{path}: no SentencePiece model ({unknown} unknown pieces instead of 1)")
    return model


def belongs(path: Path, library: Any) -> bool:
    """Whether a `.model` file holds the vocabulary of a tokenizer that transformers loaded: each piece at its id."""
    try:
        pieces = read_model(path).pieces
    except UserError:
        return False
    vocabulary = library.backend_tokenizer.get_vocab(with_added_tokens=True)
    return all(vocabulary.get(piece.text) == number for number, piece in enumerate(pieces))


def processor_of(content: bytes, where: str) -> Any:
    """SentencePiece itself with the content of a `.model` file. Raises UserError, which begins with `where`, if it does
    not take it: it asks for more than `read_model` does (every byte piece, distinct pieces).
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise UserError(f"{where}: SentencePiece does not take its vocabulary ({first_line(error)})") from error


def write_model(model: SentencePieceModel) -> bytes:
    """The model as the content of a `.model` file, which SentencePiece reads."""
    pieces = [
        _field(1, _field(1, piece.text.encode()) + _field(2, struct.pack("<f", piece.score), 5) + _field(3, piece.kind))
        for piece in model.pieces
    ]
    named = {45: model.unknown, 46: model.bos, 47: model.eos, 48: model.pad}
    trainer = [
        _field(3, next(number for number, name in MODEL_TYPES.items() if name == model.model_type)),
        _field(24, model.treat_whitespace_as_suffix),
        _field(35, model.byte_fallback),
        _field(44, model.unk_surface.encode()),
        *(_field(number, text.encode()) for number, text in named.items() if text is not None),
    ]
    normalizer = [
        _field(1, model.normalizer_name.encode()),
        _field(2, model.charsmap),
        _field(3, model.add_dummy_prefix),
        _field(4, model.remove_extra_whitespaces),
        _field(5, model.escape_whitespaces),
    ]
    return b"".join(pieces) + _field(2, b"".join(trainer)) + _field(3, b"".join(normalizer))


def _field(number: int, value: int | bytes, wire_type: int = 2) -> bytes:
    """One field: a whole number as a varint, bytes with their length, or (wire type 5) four bytes as they are."""
    if isinstance(value, int):
        return _as_varint(number << 3) + _as_varint(int(value))
    return _as_varint(number << 3 | wire_type) + (_as_varint(len(value)) if wire_type == 2 else b"") + value


def _as_varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _model(data: bytes) -> SentencePieceModel:
    """Parse `ModelProto`; the numbers are the schema's field numbers."""
    pieces = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    denormalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer.update(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_as_bytes(value)))
        elif number == 5:
            denormalizer.update(_fields(_as_bytes(value)))
    control = {piece.text for piece in pieces if piece.kind == PieceKind.CONTROL}
    named = {46: "<s>", 47: "</s>", 48: "<pad>"}
    texts = {number: _as_bytes(trainer.get(number, text.encode())).decode() for number, text in named.items()}
    bos, eos, pad = (text if text in control else None for text in texts.values())
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=MODEL_TYPES[int(trainer.get(3, 1))],
        byte_fallback=bool(trainer.get(35, 0)),
        treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
        unk_surface=_as_bytes(trainer.get(44, " \u2047 ".encode())).decode(),
        bos=bos,
        eos=eos,
        pad=pad,
        normalizer_name=_as_bytes(normalizer.get(1, b"")).decode(),
        charsmap=_as_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        has_denormalizer=bool(denormalizer.get(2, b"")),
    )


def _piece(data: bytes) -> SpmPiece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
    return SpmPiece(_as_bytes(fields[1]).decode(), score, PieceKind(int(fields.get(3, 1))))


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another type than the schema's")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protocol buffer message: varints as int, all else as the bytes it takes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire_type = tag & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
