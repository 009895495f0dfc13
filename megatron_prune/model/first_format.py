"""Files of the first format, written before kinds of units had names of their own, said as files say it today.

    live      of architecture.json     slots   of layout.json
    removal   a line of a pruning history (group_name   its group)     stage   measured facts of a run's stage

Each leaves what is in today's format as it is; a missing field is a KeyError.
"""

from typing import Any

_WIDTHS = {
    "num_attention_heads": "head",
    "num_query_groups": "kv_head",
    "ffn_hidden_size": "ffn",
    "hidden_size": "stem",
}


def live(found: dict[str, Any]) -> dict[str, Any]:
    """Live ids by kind."""
    return {"head" if name == "heads" else name: ids for name, ids in found.items()}


def slots(state: dict[str, Any]) -> dict[str, Any]:
    """Slots by kind, [sites, ranks, slots]; what `kv_index` said follows from them."""
    if "slots" in state:
        return dict(state["slots"])
    split = {"head": state["heads"], "kv_head": state["kv_heads"], "ffn": state["ffn"]}
    return {**split, "stem": [[state["stem"]]], "vocab": [state["vocab"]]}


def removal(data: dict[str, Any]) -> dict[str, Any]:
    """A removal, whose group was units of the one kind of its name."""
    if "gone" in data:
        return dict(data)
    data = dict(data)
    widths = {name: data.pop(field) for field, name in _WIDTHS.items() if name != "kv_head"}
    kind, units = data.pop("kind"), data.pop("units")
    return {**data, "group": kind, "gone": {kind: units}, "widths": widths}


def group_name(line: dict[str, Any]) -> str:
    """Name of the kind of group in a line of a history, whatever else it holds."""
    return str(line.get("group", line.get("kind")))


def stage(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a stage, its widths by kind."""
    if "widths" in facts:
        return dict(facts)
    widths = {name: facts[field] for field, name in _WIDTHS.items() if field in facts}
    return {**{key: value for key, value in facts.items() if key not in _WIDTHS}, "widths": widths}
