"""The README.md of an exported model: what it is, what was pruned away, how it was trained.

    CardFacts    what the training run knows and the architecture does not
    model_card   Architecture + facts -> Markdown with the metadata block that model hubs read

Everything in it comes from the run; what is unknown is left out. No path of the machine is written.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

import megatron_prune
from megatron_prune.huggingface import cluster
from megatron_prune.huggingface.config import CLASSES, OLDEST_TRANSFORMERS, model_class
from megatron_prune.huggingface.kv_policy import CLUSTER, EXPAND, KvPlan
from megatron_prune.model.architecture import Architecture


@dataclass(frozen=True)
class CardFacts:
    """What a run tells about itself; None or empty: unknown.

    Args:
        source_name: name of the source model (no path).
        base_model: its id on a model hub, or that of the model it was made from. licence: metadata of the source's own
            card (`license`, `license_name`, `license_link`).
        iteration: optimizer steps taken.
        tokens: training tokens consumed, the pruning phase included.
        pruning_tokens: those consumed until the last group was removed.
        removed: groups removed, by kind.
        losses: what is known of them, e.g. {"validation loss": 1.95}, in nats per token.
        settings: how it was made: option name -> value, as given to the run.
    """

    source_name: str | None = None
    base_model: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    iteration: int | None = None
    tokens: int | None = None
    pruning_tokens: int | None = None
    removed: Mapping[str, int] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    architecture: Architecture, full: Architecture, plan: KvPlan, dtype: str, stored_parameters: int, facts: CardFacts
) -> str:
    """The text of README.md.

    Args:
        full: the source.
        dtype: name of the stored dtype.
        stored_parameters: parameters in the exported files, repeated KV heads included.
    """
    is_pruned = architecture.parameters != full.parameters
    name = facts.base_model.rpartition("/")[2] if facts.base_model else facts.source_name or "A Llama model"
    title = f"{name} pruned to {_rounded(architecture.parameters)} parameters" if is_pruned else name
    shape, kind = architecture.shape, model_class(architecture)
    is_remote = plan.policy == CLUSTER
    class_name = cluster.CLASS if is_remote else CLASSES[kind]
    tags = ["megatron-prune", *(["pruned"] if is_pruned else []), *(["custom_code"] if is_remote else [])]
    metadata: dict[str, Any] = dict(facts.licence) | ({"base_model": facts.base_model} if facts.base_model else {})
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# {title}", "", _opening(architecture, full, facts), ""]
    lines += ["## Architecture", "", *_widths(architecture, full, plan), ""]
    lines += [
        f"Class: `{class_name}`, {shape.num_layers} layers, head dimension {shape.kv_channels}, vocabulary "
        f"{shape.vocab_size:,}, context {shape.max_position_embeddings:,}, "
        f"{'tied' if shape.tie_word_embeddings else 'separate'} embeddings; weights in {dtype}.",
        "",
        *_notes(architecture, plan, kind, stored_parameters),
    ]
    lines += _training(facts)
    oldest = cluster.OLDEST_TRANSFORMERS if is_remote else OLDEST_TRANSFORMERS[kind]
    code = f"the code that is in `{cluster.MODELING}.py`" if is_remote else "no code of its own"
    lines += ["## Use", "", f"Needs transformers {oldest} or newer, and {code}.", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    trust = ", trust_remote_code=True" if is_remote else ""  # AutoTokenizer reads config.json, whose class is code
    lines += [
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})',
    ]
    return "\n".join([*lines, "```", ""])


def _rounded(parameters: int) -> str:
    """1234567890 -> 1.23B, 67273000 -> 67.3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= 0.9995 * size:
            return f"{float(f'{parameters / size:.3g}'):g}{letter}"
    return str(parameters)


def _opening(architecture: Architecture, full: Architecture, facts: CardFacts) -> str:
    size = f"{architecture.parameters:,} parameters"
    source = facts.base_model or facts.source_name or "the source model"
    how = f"megatron_prune {megatron_prune.__version__}"
    if architecture.parameters == full.parameters:
        return f"{size}; exported unpruned with {how}."
    share = architecture.parameters / full.parameters
    return (
        f"{size}, {share:.1%} of the {full.parameters:,} of {source}. It was pruned while it kept training "
        f"(pruning-aware pretraining, EfficientLLM, arXiv 2502.06663) with {how}."
    )


def _widths(architecture: Architecture, full: Architecture, plan: KvPlan) -> list[str]:
    rows = [
        ("parameters", f"{full.parameters:,}", f"{architecture.parameters:,}"),
        *(
            (kind.title + " of a layer" * (not kind.is_shared), full.span(kind), architecture.span(kind))
            for kind in full.table.varying
        ),
        ("KV cache, elements per token", f"{full.kv_cache_channels:,}", f"{plan.cache_elements(architecture):,}"),
    ]
    return ["| | source | this model |", "| --- | ---: | ---: |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]


def _notes(architecture: Architecture, plan: KvPlan, kind: str, stored_parameters: int) -> list[str]:
    notes = []
    if plan.policy == EXPAND and stored_parameters != architecture.parameters:
        notes.append(
            "KV heads are stored once for each query head that uses them, since the number of query heads per KV head "
            f"varies and stock classes know one number: {stored_parameters:,} stored parameters."
        )
    if plan.policy == CLUSTER:
        notes.append(
            "Each layer keeps its own number of KV heads, and they serve different numbers of query heads "
            "(`queries_per_kv_head` in `config.json`), which no stock class computes. `megatron_prune`, in the same "
            "file, says which units of the source model these are."
        )
    elif kind != architecture.shape.model_type:
        with_what = "without a sliding window" if kind == "mistral" else "with a rotary embedding in every layer"
        notes.append(
            f"`{CLASSES[kind]}` {with_what} computes what `LlamaForCausalLM` does, and accepts a hidden size that is "
            "no multiple of the number of heads."
        )
    return [line for note in notes for line in (note, "")]


def _training(facts: CardFacts) -> list[str]:
    rows: list[tuple[str, str]] = []
    if facts.iteration is not None:
        rows.append(("optimizer steps", f"{facts.iteration:,}"))
    if facts.tokens is not None:
        rows.append(("training tokens", f"{facts.tokens:,}"))
    if facts.pruning_tokens is not None:
        rows.append(("of these until the last removal", f"{facts.pruning_tokens:,}"))
    rows += [(f"{kind} groups removed", f"{count:,}") for kind, count in facts.removed.items()]
    rows += [(f"{name} (nats per token)", f"{value:.4f}") for name, value in facts.losses.items()]
    lines = ["## Training", ""] if rows or facts.settings else []
    if rows:
        lines += ["| | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows), ""]
    if facts.settings:
        lines += ["Settings:", "", "```", *(f"{name}: {_shown(value)}" for name, value in facts.settings.items())]
        lines += ["```", ""]
    return lines


def _shown(value: Any) -> str:
    """A setting as text, in JSON's spelling unless it is text already."""
    return value if isinstance(value, str) else json.dumps(value)
