"""What perplexity is measured on: windows of tokens, each with its successor.

    is_text, check_corpus           what a --data-path names, and whether all of it can be read
    TextOptions, text_corpus        a text file, in the ids of the model's own tokenizer
    IndexedOptions, indexed_corpus  a .bin/.idx data set (or blend): the very samples that training evaluates on
    run_options                     what a training run evaluates on, from its checkpoint
    Corpus                          either of them: windows, and bytes and words where the text is known

A text is laid end to end, begun by one id that is only context, and cut into windows that do not overlap: each of its
tokens is predicted exactly once, so that bits per byte compare models with different tokenizers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_prune.checkpoint.fields import COUNT, TEXT, check_fields
from megatron_prune.data.datasets import Blend, blend_words, build_datasets, check_vocabulary, parse_blend
from megatron_prune.data.documents import SEPARATORS, read_documents
from megatron_prune.data.indexed import bin_path
from megatron_prune.data.tokenizer import Tokenizer, check_rows
from megatron_prune.errors import UserError
from megatron_prune.evaluation.models import ModelFolder
from megatron_prune.huggingface.provenance import config_of

IGNORED = -100
FIELD = "--data-path"


class Windows(Protocol):
    """Samples by number: (tokens, labels), int64 of one length; `IGNORED` marks labels that do not count."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Corpus:
    """Windows with a name; `text_bytes` (UTF-8) and `words` (between white space) where the text itself is known."""

    name: str
    windows: Windows
    text_bytes: int | None = None
    words: int | None = None


@dataclass(frozen=True)
class TextOptions:
    """How a text file becomes one row of tokens.

    Attributes:
        path: text or JSON lines, gzipped or not (see data.documents).
        prepend_bos, append_eod: frame every document, as preprocessing does.
        document_separator, json_key: what a document is.
        samples: windows to read at most, from the beginning; None: all. Bytes and words are then unknown.
    """

    path: str
    prepend_bos: bool = False
    append_eod: bool = False
    document_separator: str = SEPARATORS[0]
    json_key: str = "text"
    samples: int | None = None


@dataclass(frozen=True)
class IndexedOptions:
    """Which samples of a data set; the meaning is that of a training run's options of the same names.

    Attributes:
        path: prefix of a .bin/.idx data set, or a blend.
        split: shares of training, validation and test; the second is measured.
        seed: of the shuffle.
        samples: of `seq_length` tokens; None: one epoch, which a blend does not have.
        eod_mask_loss: leave out what is predicted at end-of-document tokens.
    """

    path: str
    split: str = "0,1,0"
    seed: int = 1234
    samples: int | None = None
    eod_mask_loss: bool = False


def is_text(path: str) -> bool:
    """Whether a --data-path names a text file, as against the prefix of a data set. Raises UserError: neither."""
    if bin_path(path).exists():
        return False
    if Path(path).is_file():
        return True
    if len(blend_words(path, FIELD)) > 1:
        return False
    if Path(path).is_fifo():
        raise UserError(f"{FIELD}: {path} is a pipe, which only one model could read; name a file")
    raise UserError(f"{FIELD}: {path} is neither a text file nor the prefix of a .bin/.idx data set")


def check_corpus(path: str, document_separator: str = SEPARATORS[0], json_key: str = "text") -> None:
    """Read what a --data-path names, before anything is computed: every document of a text, every data set of a blend.
    Raises UserError: it is missing or damaged, or a line is wrong."""
    if not is_text(path):
        parse_blend(path, field=FIELD)
        return
    for _ in read_documents([path], document_separator, json_key):
        pass


# Text -----------------------------------------------------------------------------------------------------------------


def text_corpus(options: TextOptions, tokenizer: Tokenizer, seq_length: int, vocab_size: int | None = None) -> Corpus:
    """The windows of a text file: ceil(tokens / seq_length) of them, the last one filled up with `IGNORED`.

    Args:
        vocab_size: the model's number of ids, to check that it has a row for each token; None: not checked.

    Raises:
        UserError: the file cannot be read or holds no text, bos is wanted and the tokenizer has none, or the text holds
            a token that the model has no row for.
    """
    if options.prepend_bos and tokenizer.bos is None:
        raise UserError(f"--add-bos: {tokenizer.path} has no begin-of-sequence id")
    bos = [tokenizer.bos] if options.prepend_bos and tokenizer.bos is not None else []
    eod = [tokenizer.eod] if options.append_eod else []
    ids: list[np.ndarray] = []
    text_bytes = words = 0
    for document in read_documents([options.path], options.document_separator, options.json_key):
        ids.append(np.asarray([*bos, *tokenizer.tokenize(document.text), *eod], dtype=np.int32))
        text_bytes += len(document.text.encode("utf-8"))
        words += len(document.text.split())
    if not text_bytes:
        raise UserError(f"{FIELD}: {options.path} holds no text")
    row = np.concatenate([[tokenizer.eod], *ids]).astype(np.int32)
    if vocab_size is not None and row.max() >= vocab_size:
        check_rows(tokenizer, vocab_size, f"{FIELD}: {options.path}")
    windows = _TextWindows(row, seq_length, options.samples)
    is_whole = windows.is_whole
    return Corpus(Path(options.path).name, windows, text_bytes if is_whole else None, words if is_whole else None)


class _TextWindows:
    """A row of ids, the first one context only, cut into windows."""

    def __init__(self, ids: np.ndarray, seq_length: int, samples: int | None) -> None:
        self._ids, self._length = ids, seq_length
        available = -(-(len(ids) - 1) // seq_length)
        self._count = available if samples is None else min(samples, available)
        self.is_whole = self._count == available

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._length
        row = torch.from_numpy(self._ids[start : start + self._length + 1].astype(np.int64))
        missing = self._length + 1 - len(row)
        labels = torch.cat((row[1:], torch.full((missing,), IGNORED)))
        return torch.cat((row, torch.zeros(missing, dtype=torch.int64)))[:-1], labels


# Data sets ------------------------------------------------------------------------------------------------------------


def indexed_corpus(options: IndexedOptions, candidate: ModelFolder, seq_length: int, cache: Path) -> Corpus:
    """The samples of a data set that a training run with the same options evaluates on.

    Args:
        cache: a folder for the shuffled indices.

    Raises:
        UserError: the data set is missing, damaged, another tokenizer's, or too short.
    """
    blend = parse_blend(options.path, candidate.vocab_size, FIELD)
    tokenizer = candidate.tokenizer(_kind(blend))
    check_vocabulary(tokenizer, blend, candidate.vocab_size)
    if options.samples is None and blend.weights is not None:
        raise UserError(f"{FIELD}: a blend has no end; say how much of it to read with --eval-samples")
    _, dataset, _ = build_datasets(
        blend,
        tokenizer,
        seq_length,
        (0, options.samples, 0),
        options.split,
        options.seed,
        str(cache),
        eod_mask_loss=options.eod_mask_loss,
    )
    if dataset is None:
        raise UserError(f"--split {options.split}: leaves no validation data of {options.path}")
    count = len(dataset) if options.samples is None else options.samples
    name = " + ".join(Path(prefix).name for prefix in blend.prefixes)
    return Corpus(name, _IndexedWindows(dataset, count))


def _kind(blend: Blend) -> str | None:
    """The kind of tokenizer that made the data, where that is known and one."""
    kinds = {data.metadata.tokenizer_type for data in blend.data if data.metadata is not None}
    return kinds.pop() if len(kinds) == 1 else None


class _IndexedWindows:
    """The first samples of one of megatron-core's data sets."""

    def __init__(self, dataset: Any, count: int) -> None:
        self._dataset, self._count = dataset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self._dataset[index]
        return sample["tokens"], torch.where(sample["loss_mask"] > 0, sample["labels"], IGNORED)


def run_options(meta: Mapping[str, Any], where: str) -> tuple[IndexedOptions, int]:
    """(what the run evaluates on, its sequence length), from its checkpoint's meta. Raises UserError: the checkpoint
    records no data, as one that was only imported."""
    config = config_of(meta)
    data, training = config.get("data") or {}, config.get("training") or {}
    own = "valid_data_path" if data.get("valid_data_path") else "data_path"
    if not data.get(own):
        raise UserError(f"{where}: records no data set it was trained on; give {FIELD} or --tasks")
    file, counts = Path(f"{where}: config of its run"), ("seed", "eval_iters", "global_batch_size")
    check_fields(data, {own: TEXT, "split": TEXT, "seq_length": COUNT}, file, required=True)
    check_fields(training, dict.fromkeys(counts, COUNT), file, required=True)
    options = IndexedOptions(
        path=data[own],
        split="0,1,0" if own == "valid_data_path" else data["split"],
        seed=training["seed"],
        samples=training["eval_iters"] * training["global_batch_size"],
        eod_mask_loss=data.get("eod_mask_loss", False),
    )
    return options, data["seq_length"]


def batches(windows: Windows, size: int) -> Sequence[range]:
    """Numbers of the windows from 0 on, as ranges of at most a batch."""
    return [range(start, min(start + size, len(windows))) for start in range(0, len(windows), size)]
