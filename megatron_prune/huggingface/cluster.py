"""Models exported with their own code, and every kind of Hugging Face folder as an `Architecture`.

    served_by           Architecture -> which KV head each query head uses, layer by layer
    config_json         Architecture -> the `config.json` of a `--kv-policy cluster` export
    copy_code           the configuration and model classes, into the exported folder
    refresh_code        the same into a folder exported earlier
    read_architecture   folder -> Architecture: an export of that kind with its recorded live units, any other as a
                        source model of its own

A cluster export records the source's shape and the live units by their original ids under `megatron_prune`. Its weights
are the live tensors, so that importing it again gives the very model that was exported, to be pruned further; what
stands beside that record in `config.json` must say the same.
"""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prune.data.leftovers import sole_writer
from megatron_prune.errors import UserError
from megatron_prune.huggingface import config as stock
from megatron_prune.huggingface.replacing import refresh_list
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import KV_HEAD
from megatron_prune.runtime.folders import replace_file, write_file

MODEL_TYPE, CLASS = "cluster_llama", "ClusterLlamaForCausalLM"
CONFIGURATION, MODELING = "configuration_cluster_llama", "modeling_cluster_llama"
OLDEST_TRANSFORMERS = "4.48"
RECORD = "megatron_prune"
# What a reader may have changed without making it another model.
_FREE = {*stock.SPECIAL_IDS, "architectures", "auto_map", "torch_dtype", "transformers_version", "use_cache", RECORD}
_FREE |= {"attention_dropout", "initializer_range", "rope_theta", "rope_scaling", "num_key_value_heads"}


def served_by(architecture: Architecture) -> list[np.ndarray]:
    """Per layer, for each live query head: the position of its KV head among the live ones, int64, ascending."""
    return [np.repeat(np.arange(len(counts)), counts) for counts in architecture.clusters(KV_HEAD)]


def queries_per_kv_head(architecture: Architecture) -> list[list[int]]:
    """Per layer, for each live KV head in order: how many live query heads it serves (they stand together)."""
    return [counts.tolist() for counts in architecture.clusters(KV_HEAD)]


def config_json(architecture: Architecture, dtype: str, special_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `config.json` of a model whose layers keep their own numbers of KV heads; see `config.config_json`."""
    if architecture.shape.no_rope_layers:
        raise UserError(
            "--kv-policy cluster: layers without rotary embedding are not in its code; use native or expand"
        )
    if architecture.shape.add_proj_bias or architecture.shape.add_ffn_bias:
        raise UserError("--kv-policy cluster: biases of outputs and FFNs are not in its code; use native or expand")
    if architecture.table.norms_followers:
        raise UserError("--kv-policy cluster: norms over all heads together (OLMo 2's) are not in its code; use native")
    queries = queries_per_kv_head(architecture)
    config = stock.config_json(architecture, dtype, max(map(len, queries)), special_ids)
    for field in ("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers"):
        config.pop(field, None)
    return config | {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.ClusterLlamaConfig",
            "AutoModel": f"{MODELING}.ClusterLlamaModel",
            "AutoModelForCausalLM": f"{MODELING}.{CLASS}",
        },
        "queries_per_kv_head": queries,
        "qkv_bias": architecture.shape.add_qkv_bias,
        "qk_norm": architecture.shape.qk_layernorm,
        RECORD: architecture.to_json(),
    }


def copy_code(folder: Path) -> None:
    """Write the two files that `auto_map` names into `folder`."""
    for name, content in _code().items():
        write_file(folder / name, content, lasting=False)


def refresh_code(folder: str | Path) -> list[str]:
    """Bring the code in an exported folder up to date; returns the files that were not. Nothing else is touched. Raises
    UserError: it is no cluster export, or cannot be written. Each file is the old one or the new one."""
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise UserError(f"--refresh-code {folder}: holds no config.json; name the folder of an exported model")
    if stock.read_json(folder / "config.json").get("model_type") != MODEL_TYPE:
        raise UserError(f"--refresh-code {folder}: is no export of --kv-policy cluster, so it has no code of its own")
    changed = []
    with sole_writer(folder, "--refresh-code"):
        for name, content in _code().items():
            file = folder / name
            if file.is_file() and file.read_bytes() == content:
                continue
            try:
                replace_file(file, content)
            except OSError as error:
                raise UserError(f"--refresh-code {folder}: {name} cannot be written: {error}") from error
            changed.append(name)
        try:
            refresh_list(folder, changed)
        except OSError as error:
            raise UserError(f"--refresh-code {folder}: its list of files cannot be written: {error}") from error
    return changed


def _code() -> dict[str, bytes]:
    code = resources.files("megatron_prune.huggingface") / "remote"
    return {name: (code / name).read_bytes() for name in (f"{CONFIGURATION}.py", f"{MODELING}.py")}


def read_architecture(folder: str | Path) -> Architecture:
    """The model in `folder`: its live units if it is a cluster export, else all of what `config.json` describes. Raises
    UserError: as `config.read_shape`; or a cluster export's record is missing, damaged, or contradicts the fields
    beside it."""
    file = Path(folder) / "config.json"
    if stock.present(file):
        config = stock.read_json(file)
        if config.get("model_type") == MODEL_TYPE:
            return _recorded(config, str(file))
    return Architecture.full(stock.read_shape(folder))


def _recorded(config: Mapping[str, Any], where: str) -> Architecture:
    record = config.get(RECORD)
    if not isinstance(record, dict):
        raise UserError(f"{where}: {RECORD}: is missing; it says which units of the source model are left")
    try:
        architecture = Architecture.from_json(record)
    except UserError as error:
        raise UserError(f"{where}: {RECORD}: {error}") from error
    for field, recorded in config_json(architecture, "float32").items():
        if field not in _FREE and config.get(field, recorded) != recorded:
            raise UserError(
                f"{where}: {field}: contradicts {RECORD}, the record of what was exported; restore the file"
            )
    rope = stock.read_rope(config, where)
    if rope != (architecture.shape.rotary_base, architecture.shape.rope_scaling):
        raise UserError(f"{where}: rope_theta, rope_scaling: contradict {RECORD}; restore the file")
    # In the order that a source's shape has it, whatever wrote the file: the fingerprint sees that order.
    return dataclasses.replace(architecture, shape=dataclasses.replace(architecture.shape, rope_scaling=rope[1]))
