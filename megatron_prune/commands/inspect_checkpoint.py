"""What is in a checkpoint: widths, layout, what was removed, what it was trained on, what its KV cache costs.

    megatron-prune inspect --load DIR [--ckpt-step N] [--json] [--verify] [--plot FILE]

--verify reads everything and checks sums, shapes and invariants; --plot draws which query heads live and which of them
share a KV head, layer by layer. A damaged checkpoint is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prune.commands.running import check_plot, run_command
from megatron_prune.config.options import option
from megatron_prune.errors import one_line
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.first_format import group_name
from megatron_prune.model.kinds import HEAD, KV_HEAD, find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.runtime.folders import replace_figure

if TYPE_CHECKING:
    from megatron_prune.checkpoint.reader import CheckpointReader

_FROM_STATE = ("tokens", "consumed_tokens", "consumed_samples", "consumed_samples_per_data_set")
_FROM_CONFIG = {"model": ("hf_model",), "data": ("data_path", "tokenizer_model", "seq_length")}


@dataclass(frozen=True)
class InspectOptions:
    """The command's options."""

    load: str = option(None, "folder that a run saved to, or one iter_... folder in it", metavar="DIR", required=True)
    ckpt_step: int | None = option(None, "iteration; the newest complete one unless given")
    json: bool = option(False, "print one JSON object instead of text")
    verify: bool = option(False, "read everything; check sums, shapes, values and counts")
    plot: str | None = option(
        None, "draw live query heads and their KV heads into FILE (png, svg, pdf)", metavar="FILE"
    )


def describe(reader: CheckpointReader) -> dict[str, Any]:
    """Everything the record tells, as a plain JSON object."""
    record, a = reader.record, reader.architecture
    source, layout = Architecture.full(a.shape), record.saved_layout
    return {
        "path": str(record.path),
        "iteration": record.iteration,
        "bytes": record.stored_bytes,
        "dtype": record.facts.dtype,
        "optimizer_state": list(record.facts.optimizer),
        "adam_step": record.facts.adam_step,
        "saved_on": dict(zip(("tensor", "pipeline", "data"), record.facts.mesh, strict=True)),
        "parameters": a.parameters,
        "source_parameters": source.parameters,
        "widths": a.widths(),
        "source": a.shape.to_json(),
        "layers": [
            {
                "layer": layer,
                "heads": a.ids(HEAD, layer).tolist(),
                "kv_heads": a.ids(KV_HEAD, layer).tolist(),
                "queries_per_kv_head": a.clusters(KV_HEAD)[layer].tolist(),
                "widths": {kind.name: a.width(kind, layer) for kind in a.table.varying},
            }
            for layer in a.layers
        ],
        "layout": {
            "tensor_parallel": layout.tp,
            "slots_per_rank": {kind.name: layout.width(kind) for kind in layout.placed},
            "empty_slots": {kind.name: layout.empty_slots(kind) for kind in layout.placed},
        },
        "kv_cache_elements_per_token": a.kv_cache_channels,
        "source_kv_cache_elements_per_token": source.kv_cache_channels,
        "trained": _trained(record.state),
        "removals": _removals(record.history),
    }


def _trained(state: dict[str, Any]) -> dict[str, Any]:
    """What the model has seen, out of the run's state and its configuration."""
    from megatron_prune.huggingface.provenance import config_of

    found: dict[str, Any] = {key: state[key] for key in _FROM_STATE if key in state}
    config = config_of(state)
    for section, keys in _FROM_CONFIG.items():
        values = config.get(section) or {}
        found |= {key: values[key] for key in keys if values.get(key) is not None}
    return found


def _removals(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of removals in a few numbers."""
    margins = [line["margin"] for line in history if line.get("margin") is not None]
    found: dict[str, Any] = {"groups": len(history), "by_kind": dict(Counter(map(group_name, history)))}
    if history:
        found |= {"first_iteration": history[0]["iteration"], "last_iteration": history[-1]["iteration"]}
    if margins:
        found["least_margin"] = min(margins)
    return found


def problems(reader: CheckpointReader) -> Iterator[str]:
    """What contradicts the record, one line each (sums were checked when the reader was opened)."""
    import torch

    a = reader.architecture
    shapes = a.table.hf_shapes(a)
    if set(reader.names) != set(shapes):
        yield f"stored tensors differ from the architecture's: {sorted(set(reader.names) ^ set(shapes))[:3]}"
        return
    count = 0
    for name, shape in shapes.items():
        tensors = {"weight": reader.read(name)}
        tensors |= {kind: reader.read_optimizer(kind, name) for kind in reader.record.facts.optimizer}
        count += tensors["weight"].numel()
        for kind, tensor in tensors.items():
            if tuple(tensor.shape) != shape:
                yield f"{name} ({kind}): shape {tuple(tensor.shape)}, the live shape is {shape}"
            if not bool(torch.isfinite(tensor).all()):
                yield f"{name} ({kind}): holds values that are not finite"
            if kind == "exp_avg_sq" and bool((tensor < 0).any()):
                yield f"{name} ({kind}): holds negative values"
    if count != a.parameters:
        yield f"{count} weights are stored, the architecture counts {a.parameters}"
    history = reader.record.history
    if history and history[-1].get("parameters", a.parameters) != a.parameters:
        yield f"the last removal left {history[-1]['parameters']} parameters, the architecture counts {a.parameters}"


def _width(name: str, width: int | list[int], shape: LlamaShape) -> str:
    """`ffn 40 of 48`; `KV heads 2 to 4 of 4` where layers differ."""
    kind, counts = find_kind(name), [width] if isinstance(width, int) else width
    shown = f"{min(counts)} to {max(counts)}" if min(counts) != max(counts) else f"{counts[0]}"
    return f"{kind.label} {shown} of {kind.size(shape)}"


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The description as text."""
    widths, shape, layout = facts["widths"], LlamaShape.from_json(facts["source"]), facts["layout"]
    yield f"checkpoint   {facts['path']}, iteration {facts['iteration']}, {facts['bytes']:,} bytes"
    state = ", ".join(facts["optimizer_state"]) or "none"
    yield f"             {facts['dtype']} weights; optimizer state: {state}; Adam step {facts['adam_step']}"
    mesh = facts["saved_on"]
    yield f"             saved on TP {mesh['tensor']} x PP {mesh['pipeline']} x DP {mesh['data']}"
    share = facts["parameters"] / facts["source_parameters"]
    yield f"parameters   {facts['parameters']:,} of {facts['source_parameters']:,} ({share:.1%})"
    yield (
        f"widths       {', '.join(_width(name, width, shape) for name, width in widths.items())}, "
        f"head dimension {shape.kv_channels}, vocabulary {shape.vocab_size}"
    )
    cache, full = facts["kv_cache_elements_per_token"], facts["source_kv_cache_elements_per_token"]
    yield f"KV cache     {cache:,} of {full:,} elements per token: {2 * cache:,} bytes in 16 bits, {4 * cache:,} in 32"
    slots = ", ".join(
        f"{kind} {layout['slots_per_rank'][kind]} ({layout['empty_slots'][kind]} empty)"
        for kind in layout["slots_per_rank"]
    )
    yield f"slots        per rank of {layout['tensor_parallel']} (empty ones over all): {slots}"
    trained = ", ".join(f"{key} {value}" for key, value in facts["trained"].items()) or "nothing recorded"
    yield f"trained      {trained}"
    removals = facts["removals"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(removals["by_kind"].items()))
    when = f", iterations {removals['first_iteration']} to {removals['last_iteration']}" if kinds else ""
    margin = f", least margin {removals['least_margin']:.2e}" if "least_margin" in removals else ""
    yield f"removed      {removals['groups']} groups{': ' + kinds if kinds else ''}{when}{margin}"
    yield "layer  query heads -> per KV head"
    for layer in facts["layers"]:
        pairs = zip(layer["kv_heads"], layer["queries_per_kv_head"], strict=True)
        clusters = " ".join(f"{kv}:{queries}" for kv, queries in pairs)
        yield f"{layer['layer']:5d}  {' '.join(map(str, layer['heads']))} -> {clusters}"


def plot(architecture: Architecture, path: Path) -> None:
    """Layers down, original query heads across; colour and number are the KV head's, removed heads are blank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = architecture.shape
    owners = np.full((shape.num_layers, shape.num_attention_heads), np.nan)
    for layer, heads in enumerate(architecture.sites(HEAD)):
        owners[layer, heads] = KV_HEAD.serving(heads, shape)
    figure, axes = pyplot.subplots(
        figsize=(2 + 0.3 * shape.num_attention_heads, 1.5 + 0.3 * shape.num_layers), layout="constrained"
    )
    axes.imshow(owners % 20, cmap="tab20", vmin=-0.5, vmax=19.5, aspect="equal", interpolation="nearest")
    for layer, head in zip(*np.nonzero(~np.isnan(owners)), strict=True):
        axes.text(head, layer, f"{owners[layer, head]:.0f}", ha="center", va="center", fontsize=7)
    axes.set_xticks(range(shape.num_attention_heads))
    axes.set_yticks(range(shape.num_layers))
    axes.set_xticks(np.arange(0, shape.num_attention_heads + 1, shape.heads_per_group) - 0.5, minor=True)
    axes.set_yticks(np.arange(shape.num_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.7", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("query head (original number)")
    axes.set_ylabel("layer")
    live = sum(map(len, architecture.sites(KV_HEAD)))
    axes.set_title(
        f"Live query heads, by the KV head they share: {architecture.span(HEAD)} of "
        f"{shape.num_attention_heads} per layer, {live} of {shape.num_layers * shape.num_query_groups} KV heads",
        fontsize=9,
        wrap=True,
    )
    replace_figure(path, figure, dpi=150)
    pyplot.close(figure)


def inspect(arguments: InspectOptions) -> int:
    """Print, draw and verify; the exit status. Raises UserError."""
    from megatron_prune.checkpoint.reader import CheckpointReader

    if arguments.plot:
        check_plot("--plot", arguments.plot)
    reader = CheckpointReader(arguments.load, arguments.ckpt_step, verify=arguments.verify)
    facts = describe(reader)
    if arguments.plot:
        plot(reader.architecture, Path(arguments.plot))
    if arguments.verify:
        facts["problems"] = list(problems(reader))
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(map(one_line, lines(facts))))
    for problem in facts.get("problems", ()):
        print(one_line(f"error: {facts['path']}: {problem}"), file=sys.stderr)
    if arguments.verify and not facts["problems"] and not arguments.json:
        print("verified     sums, shapes, values and counts agree")
    return 2 if facts.get("problems") else 0


main = partial(run_command, "inspect", InspectOptions, inspect)
