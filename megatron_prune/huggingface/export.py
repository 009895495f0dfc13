"""Write an architecture and its weights as a folder that `transformers` loads.

    export     weights (streamed), config, generation config, tokenizer, model card; with `--kv-policy cluster` the
               model's code, else stock classes load it
    Exported   what was written

Everything is written into a folder beside the wanted one and renamed at the end (`replacing`): what is there is whole.
Memory: about the largest tensor, a few times while KV heads are repeated or the dtype changes.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.data.leftovers import claim_folder, sole_writer, staging
from megatron_prune.data.tokenizer import Tokenizer, build_tokenizer, check_rows
from megatron_prune.data.tokenizer_files import SENTENCEPIECE, SIDE_FILES, find_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface import cluster
from megatron_prune.huggingface.config import SPECIAL_IDS, WRITTEN_FOR, config_json
from megatron_prune.huggingface.kv_policy import AUTO, CLUSTER, KvPlan
from megatron_prune.huggingface.model_card import CardFacts, model_card
from megatron_prune.huggingface.replacing import check_kept, check_replaceable, put_in_place, recover, write_list
from megatron_prune.huggingface.shards import (
    DTYPES,
    ShardEntry,
    StoredDtypes,
    dtype_name,
    parse_size,
    plan_shards,
    write_shards,
)
from megatron_prune.huggingface.tokenizer_copy import copy_tokenizer
from megatron_prune.huggingface.tokenizer_export import export_tokenizer
from megatron_prune.huggingface.weights import layers_left
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.sources import finite, is_finite
from megatron_prune.model.table import EMBEDDING, Part
from megatron_prune.runtime.failures import mishap
from megatron_prune.runtime.folders import write_file

logger = logging.getLogger(__name__)

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the folder, its weight files, the class, the KV policy in force, dtypes and sizes."""

    folder: Path
    files: tuple[Path, ...]
    class_name: str
    plan: KvPlan
    dtypes: StoredDtypes
    stored_parameters: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most weights are stored in."""
        return self.dtypes.main


def export(
    read: Reader,
    architecture: Architecture,
    save_dir: str | Path,
    *,
    dtype: str | None = None,
    other_dtypes: Mapping[str, str] | None = None,
    kv_policy: str = AUTO,
    tokenizer_model: str | None = None,
    tokenizer_type: str | None = None,
    check_tokenizer: Callable[[Tokenizer], None] = lambda _: None,
    max_shard_size: str = "5GB",
    source: Mapping[str, Any] | None = None,
    facts: CardFacts | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a model; `save_dir` must not hold anything yet.

    Args:
        read: Hugging Face name in the source -> the LIVE tensor, units in original-id order; each is asked for once, in
            model order. Layers that are left are numbered anew in the export.
        dtype: one of `shards.DTYPES`; None keeps that of the embedding.
        other_dtypes: Hugging Face name -> dtype of weights to be stored in another one.
        kv_policy: see `kv_policy`.
        tokenizer_model, tokenizer_type: the tokenizer trained with, as `build_tokenizer` takes them; None writes none.
        check_tokenizer: raises UserError for a tokenizer that must not be exported.
        max_shard_size: e.g. `5GB`, of tensor data per file.
        source: what `source_facts.read_source` said of the source model.
        facts: for the model card.
        overwrite: replace an export; files in its folder that it did not write stay (see `replacing`).

    Raises:
        UserError: an option is wrong or not exact, the folder is in the way or cannot be written, the tokenizer does
            not fit, or a weight does not fit into float16. Nothing is left behind.
    """
    source_architecture = Architecture.full(architecture.shape)
    read, architecture = layers_left(read, architecture)
    target = Path(save_dir).resolve()
    _check_target(target, overwrite)
    max_bytes = parse_size(max_shard_size)
    plan = KvPlan.choose(architecture, kv_policy)
    stored = _dtypes(read, architecture, dtype, other_dtypes or {})
    tokenizer = build_tokenizer(tokenizer_type, tokenizer_model) if tokenizer_model else None
    if tokenizer is not None:
        check_rows(tokenizer, architecture.shape.vocab_size, "--tokenizer-model")
        check_tokenizer(tokenizer)
    try:
        with sole_writer(target, "--save"), _staged(target, overwrite) as staged:
            files, parameters = _write_weights(staged, read, architecture, plan, stored, max_bytes)
            config = _write_settings(staged, architecture, plan, stored.main, tokenizer, source or {})
            if tokenizer is not None:
                _write_tokenizer(staged, tokenizer, architecture.shape.max_position_embeddings)
            facts = facts or CardFacts()
            card = model_card(architecture, source_architecture, plan, dtype_name(stored.main), parameters, facts)
            write_file(staged / "README.md", card.encode(), lasting=False)
            _publish(staged, target)
    except OSError as error:
        raise UserError(f"--save {target}: cannot be written: {mishap(error) or error}") from error
    written = tuple(target / file.name for file in files)
    return Exported(target, written, config["architectures"][0], plan, stored, parameters)


def _dtypes(read: Reader, architecture: Architecture, dtype: str | None, others: Mapping[str, str]) -> StoredDtypes:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; use {', '.join(DTYPES)}")
    embedding = architecture.table.find(EMBEDDING).parts[0].hf_name
    main = DTYPES[dtype] if dtype else read(embedding).dtype
    return StoredDtypes(main, {name: DTYPES[other] for name, other in others.items()})


@contextmanager
def _staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write into, beside `target`, which may be replaced."""
    recover(target)
    _check_target(target, overwrite)
    staged = staging(target)
    with claim_folder(staged):
        yield staged


def _publish(staged: Path, target: Path) -> None:
    write_list(staged)
    check_kept(staged, target)
    put_in_place(staged, target)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"--save {target}: is a file; name a folder that does not exist yet")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"--save {target}: is not empty; name another folder, or replace it with --overwrite")
    check_replaceable(target)


def _write_weights(
    folder: Path, read: Reader, architecture: Architecture, plan: KvPlan, dtypes: StoredDtypes, max_bytes: int
) -> tuple[list[Path], int]:
    """Stream all tensors; returns the files and how many parameters they hold."""
    live = architecture.table.hf_shapes(architecture)
    where = architecture.table.parts
    shapes = {name: plan.stored_shape(part, layer, live[name]) for name, (part, layer) in where.items()}
    entries = [ShardEntry(name, shape, dtypes.of(name)) for name, shape in shapes.items()]

    def fetch(name: str) -> Tensor:
        part, layer = where[name]
        tensor = finite(read(name), f"the checkpoint: {name}", "name an older one with --ckpt-step")
        assert tuple(tensor.shape) == live[name], f"{name}: {tuple(tensor.shape)} instead of {live[name]}"
        stored = dtypes.of(name)
        result = plan.apply(part, layer, tensor).to(stored)
        if result is not tensor and not is_finite(result):
            raise UserError(
                f"--dtype {dtype_name(stored)}: {name} holds values beyond its range; export with --dtype float32"
            )
        return result

    files = write_shards(folder, plan_shards(entries, max_bytes), fetch)
    return files, sum(entry.elements for entry in entries)


def stored_weights(
    read: Reader, architecture: Architecture, plan: KvPlan, dtypes: StoredDtypes
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """For every weight of an export: its name, and a function that reads it anew, as it should be stored."""
    for name, (part, layer) in architecture.table.parts.items():
        yield name, partial(_stored, read, plan, part, layer, name, dtypes.of(name))


def _stored(read: Reader, plan: KvPlan, part: Part, layer: int, name: str, dtype: torch.dtype) -> Tensor:
    return plan.apply(part, layer, read(name)).to(dtype)


def _write_settings(
    folder: Path,
    architecture: Architecture,
    plan: KvPlan,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Write config.json, generation_config.json and the model's code if it has its own; returns the first."""
    ids = _special_ids(source, tokenizer, architecture.shape.vocab_size)
    if plan.policy == CLUSTER:
        config = cluster.config_json(architecture, dtype_name(dtype), ids)
        cluster.copy_code(folder)
    else:
        config = config_json(architecture, dtype_name(dtype), plan.num_key_value_heads, ids)
    generation = ids | (source.get("generation_config") or {}) | {"transformers_version": WRITTEN_FOR}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        write_file(folder / name, (json.dumps(content, indent=2) + "\n").encode(), lasting=False)
    return config


def _special_ids(source: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """Begin, end and padding ids: the source model's, else the tokenizer's; none that is outside the vocabulary."""
    ids = dict(source.get("special_ids") or {})
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod} | ids
    found: dict[str, Any] = {}
    for name in SPECIAL_IDS:
        value = ids.get(name)
        if isinstance(value, list):
            value = [one for one in value if isinstance(one, int) and 0 <= one < vocab_size]
            if value:
                found[name] = value
        elif isinstance(value, int) and 0 <= value < vocab_size:
            found[name] = value
    return found


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Tokenizer files; after config.json, which has a say in the class that transformers picks."""
    place = find_tokenizer(tokenizer.path, tokenizer.kind)
    if tokenizer.kind != SENTENCEPIECE:
        copy_tokenizer(place, folder)
        return
    export_tokenizer(place.vocabulary, folder, max_length)
    beside = [name for name in SIDE_FILES if Path(tokenizer.path).is_dir() and (place.folder / name).exists()]
    if beside:
        logger.warning("%s: trained with as SentencePiece alone; %s left out", place.vocabulary, ", ".join(beside))
