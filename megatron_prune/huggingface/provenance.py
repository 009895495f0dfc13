"""What a checkpoint's meta tells about where the model comes from: for the model card, the tokenizer, the special ids.

Read are the keys `config` (YAML text of the run), `iteration`, `consumed_tokens`, `history`, `stages`, `source`,
`tokenizer_model` and `tokenizer_type`, all optional: an export needs none of them.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from megatron_prune.checkpoint.fields import TABLE, TEXT, check_fields
from megatron_prune.config import load_plain_yaml
from megatron_prune.errors import UserError
from megatron_prune.huggingface.model_card import CardFacts
from megatron_prune.huggingface.shards import DTYPES
from megatron_prune.huggingface.source_facts import read_source
from megatron_prune.model.first_format import group_name

_TOLD = {
    "pruning": None,
    "continued": None,
    "optimizer": None,
    "training": ("micro_batch_size", "global_batch_size", "seed", "bf16"),
    "data": ("data_path", "seq_length"),
}
_SOURCE = {"name": TEXT, **dict.fromkeys(("card", "special_ids", "dtypes", "generation_config"), TABLE), "dtype": TEXT}
_STAGES = {
    "source": "validation loss of the source model",
    "pruned": "validation loss on reaching the target size",
    "final": "validation loss",
}


def run_facts(meta: Mapping[str, Any]) -> CardFacts:
    """The model card's facts, as far as `meta` has them."""
    history = meta.get("history") or []
    stages = meta.get("stages") or {}
    losses = {
        words: float(stages[stage]["validation_loss"])
        for stage, words in _STAGES.items()
        if (stages.get(stage) or {}).get("validation_loss") is not None
    }
    tokens = meta.get("consumed_tokens", meta.get("tokens"))
    source = source_of(meta)
    card = dict(source.get("card") or {})
    return CardFacts(
        source_name=source.get("name"),
        base_model=card.pop("base_model", None),
        licence=card,
        iteration=meta.get("iteration") or None,
        tokens=tokens or None,
        pruning_tokens=history[-1].get("tokens") if history else None,
        removed=dict(Counter(map(group_name, history))),
        losses=losses,
        settings=_settings(config_of(meta)),
    )


def tokenizer_of(meta: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """(kind or None, path) of the tokenizer, or None where none is recorded."""
    if meta.get("tokenizer_model"):
        return meta.get("tokenizer_type"), str(meta["tokenizer_model"])
    config = config_of(meta)
    data = config.get("data") or {}
    path = data.get("tokenizer_model") or (config.get("model") or {}).get("hf_model")
    return (data.get("tokenizer_type"), str(path)) if path else None


def source_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The source model's facts: as recorded, else read from its folder if that is still there, else {}."""
    if meta.get("source"):
        check_fields(meta["source"], _SOURCE, Path("source of the checkpoint's run"))
        return dict(meta["source"])
    folder = (config_of(meta).get("model") or {}).get("hf_model")
    return read_source(folder) if folder and (Path(folder) / "config.json").is_file() else {}


def dtypes_of(meta: Mapping[str, Any], stored: str) -> tuple[str, dict[str, str]]:
    """(dtype, weights in another one) of an export unless asked: the source's, else `stored`, the checkpoint's."""
    source = source_of(meta)
    if source.get("dtype") not in DTYPES:
        return stored, {}
    others = source.get("dtypes") or {}
    return str(source["dtype"]), {name: dtype for name, dtype in others.items() if dtype in DTYPES}


def config_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration as plain mappings; an older version's is read as well. Raises UserError."""
    try:
        content = load_plain_yaml(meta.get("config") or "{}")
    except ValueError as error:
        raise UserError(f"config of the checkpoint's run: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values() if values):
        raise UserError("config of the checkpoint's run: no sections of options")
    return content


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say how the model was made and are set to something; paths without their folders."""
    told: dict[str, Any] = {}
    for section, names in _TOLD.items():
        for name, value in (config.get(section) or {}).items():
            if value is None or (names is not None and name not in names):
                continue
            told[name] = " ".join(PurePath(word).name for word in value.split()) if isinstance(value, str) else value
    return told
