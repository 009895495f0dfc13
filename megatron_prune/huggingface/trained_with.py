"""Is a tokenizer the one that a checkpoint's training data was made with?

Known are kind and fingerprint (SHA-256 of the vocabulary, see `Tokenizer.fingerprint`), from the checkpoint; of one
that records none, from the data's own .json files where these are still there. Data that Megatron-LM's tool made tell
nothing: then the tokenizer trained with counts.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_prune.data.datasets import blend_words
from megatron_prune.data.indexed import Metadata, read_metadata
from megatron_prune.data.tokenizer import Tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.provenance import config_of

logger = logging.getLogger(__name__)

_FINGERPRINT, _OF_DATA = "tokenizer_fingerprint", "data_tokenizers"


def tokenizer_facts(tokenizer: Tokenizer, made: Iterable[Metadata | None]) -> dict[str, Any]:
    """For the meta of a run with this tokenizer: its fingerprint, and those that its data sets were made with."""
    found = {(data.tokenizer_type, data.tokenizer_fingerprint, data.tokenizer_path) for data in made if data}
    return {_FINGERPRINT: tokenizer.fingerprint, _OF_DATA: [list(entry) for entry in sorted(found)]}


def check_tokenizer(tokenizer: Tokenizer, meta: Mapping[str, Any], allow_other: bool = False) -> None:
    """See that `tokenizer` is the data's; a warning where training knew of the difference already, or `allow_other`.
    Raises UserError: it is another one."""
    known = _of_data(meta)
    trained = meta.get(_FINGERPRINT)
    if not known and trained:
        known = [(str(meta.get("tokenizer_type")), str(trained), str(meta.get("tokenizer_model")))]
    for kind, fingerprint, path in known:
        if (kind, fingerprint) == (tokenizer.kind, tokenizer.fingerprint):
            continue
        what = (
            f"{tokenizer.path} ({tokenizer.kind} {tokenizer.fingerprint[:12]}) is not the tokenizer that the training "
            f"data was made with, {path} ({kind} {fingerprint[:12]})"
        )
        if not allow_other and trained != tokenizer.fingerprint:
            raise UserError(
                f"{what}; name that one by --tokenizer-model, or give --allow-other-tokenizer if both give the same ids"
            )
        logger.warning("%s; see that both give the same ids", what)


def _of_data(meta: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(kind, fingerprint, path) of the tokenizers that the training data was made with, as far as it is known."""
    if _OF_DATA in meta:
        return [(str(kind), str(fingerprint), str(path)) for kind, fingerprint, path in meta[_OF_DATA]]
    path = (config_of(meta).get("data") or {}).get("data_path")
    found = set()
    try:
        for prefix in blend_words(path) if isinstance(path, str) else ():
            made = read_metadata(prefix)  # of a weight there is none
            if made is not None:
                found.add((made.tokenizer_type, made.tokenizer_fingerprint, made.tokenizer_path))
    except UserError as error:
        logger.warning("which tokenizer made the training data is not known: %s", error)
    return sorted(found)
