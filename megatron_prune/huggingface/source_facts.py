"""What a source folder says beside its model's shape, and an export wants back: read once, kept in checkpoints."""

import re
from pathlib import Path
from typing import Any

from megatron_prune.config import load_plain_yaml
from megatron_prune.data.hub_files import hub_id, read_json
from megatron_prune.data.tokenizer_files import settings_in
from megatron_prune.errors import UserError
from megatron_prune.huggingface.config import SPECIAL_IDS, Fields, shown
from megatron_prune.huggingface.shards import dtype_name
from megatron_prune.huggingface.weights import FolderWeights
from megatron_prune.reading import insist_own, read_words

CARD_FIELDS = ("license", "license_name", "license_link", "base_model")


def read_source(folder: str | Path) -> dict[str, Any]:
    """What an export wants back and `LlamaShape` does not hold, as a JSON object for the checkpoint's meta.

    Returns:
        `name` (the folder's own name, no path; the model's where the folder is a hub's cache), `card` (of
        `CARD_FIELDS`, what is known), `special_ids` (those of `SPECIAL_IDS` that are set), `dtype` (that most
        of the weights are stored in; without weights as stated in `config.json`, or None), `dtypes` (name -> dtype of
        the weights that are in another), `generation_config` (its content, {} where the file is missing).

    Raises:
        UserError: a file cannot be read, or a special id or dtype is none.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    generation = settings_in(folder / "generation_config.json")
    fields, cached = Fields(config, str(folder / "config.json")), hub_id(folder)
    return {
        "name": cached.partition("/")[2] if cached else folder.resolve().name,
        "card": _read_card(folder),
        "special_ids": {name: config[name] for name in SPECIAL_IDS if _is_id(fields, name)},
        **_stored_dtypes(folder, fields.word("dtype") or fields.word("torch_dtype")),
        "generation_config": generation,
    }


def _stored_dtypes(folder: Path, stated: str | None) -> dict[str, Any]:
    """`dtype` and `dtypes` of `read_source`; the files' own, since config.json may state another one."""
    try:
        main, others = FolderWeights(folder).dtypes
    except UserError:  # absent or damaged, which is for those to say who need the weights
        return {"dtype": stated, "dtypes": {}}
    return {"dtype": dtype_name(main), "dtypes": {name: dtype_name(dtype) for name, dtype in others.items()}}


def _is_id(fields: Fields, name: str) -> bool:
    """Whether a special id is set; raises UserError when that is neither an id nor a list of ids."""
    value = fields.get(name)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(one) is int and -1 <= one < 1 << 31 for one in ids):
        raise fields.refuse(name, f"{shown(value)} is no token's id")
    return value is not None


def _read_card(folder: Path) -> dict[str, str]:
    """Of `CARD_FIELDS`, what the metadata at the head of the folder's README.md states.

    `base_model` is the model's own id where the folder is a hub's cache, else the id of the model it was made from. A
    card is written for people, so what cannot be read in it keeps nobody from using the model; nothing local is taken.
    """
    try:
        insist_own(folder / "README.md")
        head = re.match(r"---\n(.*?)\n---", read_words(folder / "README.md"), re.DOTALL)
        content = load_plain_yaml(head[1]) if head else None
    except (OSError, ValueError):
        content = None
    stated = content if isinstance(content, dict) else {}
    base = stated.get("base_model")
    stated = stated | {"base_model": base[0] if isinstance(base, list) and len(base) == 1 else base}
    if cached := hub_id(folder):
        stated["base_model"] = cached
    found = {name: stated[name] for name in CARD_FIELDS if isinstance(stated.get(name), str)}
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", found.get("base_model", "")):
        found.pop("base_model", None)
    if "://" not in found.get("license_link", ""):  # a file that does not travel along
        found.pop("license_link", None)
    return found
