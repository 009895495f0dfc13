"""What is evaluated: a folder that transformers loads, and the tokenizer that belongs to it.

    ModelFolder         a model's folder, name, size and tokenizer
    open_candidate      folder -> ModelFolder; a bare SentencePiece file gets its exact Hugging Face form first
    export_checkpoint   a training checkpoint -> a folder, as megatron-prune convert-to-hf writes it
    load_model          ModelFolder -> the model, by stock transformers

What `AutoTokenizer` makes of a folder that holds only a `tokenizer.model` depends on its version, and other ids ruin
every score without a word (docs/huggingface.md has numbers); therefore the conversion.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prune.data.hub_files import present, read_json
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer
from megatron_prune.data.tokenizer_files import (
    HUGGING_FACE,
    SENTENCEPIECE,
    VOCABULARY_FILES,
    find_tokenizer,
    holds_tokenizer,
)
from megatron_prune.data.tokenizer_library import adds_bos, load_library
from megatron_prune.errors import UserError
from megatron_prune.huggingface.export import export
from megatron_prune.huggingface.provenance import source_of, tokenizer_of
from megatron_prune.huggingface.shards import DTYPES, dtype_name
from megatron_prune.huggingface.tokenizer_copy import copy_tokenizer
from megatron_prune.huggingface.tokenizer_export import export_tokenizer
from megatron_prune.huggingface.verify_export import load_stock_model
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.model.kinds import known_kinds
from megatron_prune.model.table import HF_LM_HEAD


@dataclass(frozen=True)
class ModelFolder:
    """A model to evaluate.

    Attributes:
        name: what tables call it.
        folder: its Hugging Face folder.
        tokenizer_folder: where transformers finds its tokenizer; the folder itself, or a converted form elsewhere.
            None where there is none.
        tokenizer_source: what `build_tokenizer` reads.
        parameters: elements of all stored tensors, a tied output layer counted once.
        dtype: of the stored weights.
        vocab_size, max_length: ids the model knows, tokens it takes.
        brings_code: whether its folder holds code that transformers must run.
    """

    name: str
    folder: Path
    tokenizer_folder: Path | None
    tokenizer_source: Path | None
    parameters: int
    dtype: str
    vocab_size: int
    max_length: int
    brings_code: bool

    def tokenizer(self, kind: str | None = None) -> Tokenizer:
        """The tokenizer; of that kind if both kinds are there. Raises UserError: there is none."""
        if self.tokenizer_source is None:
            raise UserError(f"{self.folder}: holds no tokenizer; name one with --tokenizer-model")
        both = kind == SENTENCEPIECE and (self.tokenizer_source / "tokenizer.model").is_file()
        return build_tokenizer(SENTENCEPIECE if both else None, str(self.tokenizer_source))

    def adds_bos(self) -> bool:
        """Whether calling the tokenizer, as transformers loads it, begins with the begin-of-sequence id. Raises
        UserError: it cannot be read."""
        folder = self.tokenizer_folder
        return folder is not None and adds_bos(load_library(find_tokenizer(folder)))


def open_candidate(folder: str | Path, name: str, scratch: Path, tokenizer_model: str | None = None) -> ModelFolder:
    """A model's folder, looked into but not loaded.

    Args:
        scratch: an empty folder of the caller's, for a converted tokenizer.
        tokenizer_model: file or folder of the tokenizer, where the model's own folder holds none.

    Raises:
        UserError: the folder holds no model, values that are not finite (tasks would score it all the same), or a
            tokenizer that cannot be read exactly.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    if not present(config_file):
        raise UserError(f"{config_file}: does not exist; name the folder of a Hugging Face model")
    config = read_json(config_file)
    weights = FolderWeights(folder)
    weights.check_finite()
    tied = bool(config.get("tie_word_embeddings"))
    sizes = [math.prod(stored.shape) for key, stored in weights.stored.items() if not (tied and key == HF_LM_HEAD)]
    source, converted = _tokenizer(folder, scratch, tokenizer_model)
    return ModelFolder(
        name=name,
        folder=folder,
        tokenizer_folder=converted,
        tokenizer_source=source,
        parameters=sum(sizes),
        dtype=dtype_name(weights.dtype),
        vocab_size=_whole(config, "vocab_size", config_file),
        max_length=_whole(config, "max_position_embeddings", config_file),
        brings_code="auto_map" in config,
    )


def _whole(config: dict[str, Any], field: str, file: Path) -> int:
    if not isinstance(config.get(field), int):
        raise UserError(f"{file}: {field}: is missing or no whole number")
    return config[field]


def _tokenizer(folder: Path, scratch: Path, tokenizer_model: str | None) -> tuple[Path | None, Path | None]:
    """(what `build_tokenizer` reads, the folder that transformers reads)."""
    if holds_tokenizer(folder):
        source = folder
    elif tokenizer_model is not None:
        source = Path(tokenizer_model)
        if not source.exists():
            raise UserError(f"--tokenizer-model {tokenizer_model}: does not exist")
    else:
        return None, None
    place = find_tokenizer(source)
    converted = scratch / "tokenizer"
    if place.kind == HUGGING_FACE and place.vocabulary.name in VOCABULARY_FILES:
        return source, place.folder
    if place.kind == HUGGING_FACE:
        copy_tokenizer(place, converted)
        return source, converted
    export_tokenizer(place.vocabulary, converted, None)
    return source, converted


def export_checkpoint(
    load: str | Path, step: int | None, save: Path, tokenizer_model: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Write a checkpoint as a Hugging Face folder in its own dtype.

    Returns:
        The checkpoint's name (run and iteration), and its meta (see `CheckpointReader.meta`).

    Raises:
        UserError: there is no such checkpoint, or what it records as its tokenizer is gone and no other is named.
    """
    from megatron_prune.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(load, step)
    kind, path = (None, tokenizer_model) if tokenizer_model else tokenizer_of(reader.meta) or (None, None)
    if path is not None and not Path(path).exists():
        raise UserError(f"{load}: the tokenizer it was trained with, {path}, is gone; name it with --tokenizer-model")
    export(
        reader.read,
        reader.architecture,
        save,
        dtype=reader.record.facts.dtype,
        tokenizer_model=path,
        tokenizer_type=kind,
        source=source_of(reader.meta),
    )
    return f"{reader.path.parent.name} at {reader.record.iteration}", reader.meta


def load_model(candidate: ModelFolder, device: str, dtype: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model on `device`, ready to evaluate; weights in their stored dtype unless another one is named. Raises
    UserError: transformers is missing or refuses the folder, weights are missing or left over, or the dtype is unknown.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = load_stock_model(candidate.folder, trust_remote_code=trust_remote_code)
    return model.to(device=torch.device(device), dtype=DTYPES[dtype or candidate.dtype]).eval()


def describe(candidate: ModelFolder, dtype: str | None = None) -> dict[str, Any]:
    """What a report says about the model; `dtype`: what it is computed in, as stored unless given."""
    config = read_json(candidate.folder / "config.json")
    return {
        "name": candidate.name,
        "parameters": candidate.parameters,
        "dtype": dtype or candidate.dtype,
        "stored_dtype": candidate.dtype,
        "class": (config.get("architectures") or ["?"])[0],
        **{kind.hf_key: config.get(kind.hf_key) for kind in known_kinds() if kind.varies and kind.hf_key},
    }
