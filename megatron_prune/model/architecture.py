"""Widths: which units of the source model are still alive, and how many parameters that is.

    Group          what one pruning step removes
    Architecture   LlamaShape + the live units by their ORIGINAL ids; the one owner of widths and of the parameter count

Each layer has its own live units of a kind (a shared kind has one set for all), and nothing here asks layers to be
equally wide: groups decide that. Units that follow others (a KV head its query heads) live while one of those does. A
layer can leave with all its units; the others keep their numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_prune.errors import UserError
from megatron_prune.model import first_format
from megatron_prune.model.families import table_of
from megatron_prune.model.kinds import LAYER, Kind, find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import ATTENTION_OUTPUT, FFN_DOWN, QKV, ParamTable, holds, runs

Units = tuple[tuple[int, ...], ...]  # original ids, a tuple per site


@dataclass(frozen=True)
class Group:
    """What one pruning step removes.

    Args:
        name: of the kind of group (see `pruning.groups`).
        gone: for each kind of unit that it takes, the original ids by site: a tuple per layer, for a shared kind one.
    """

    name: str
    gone: Mapping[Kind, Units]

    @classmethod
    def of(cls, kind: Kind | str, units: Iterable[Iterable[int]], name: str | None = None) -> Group:
        """A group of `units` of one kind (or the one of that name), called like it unless it has its own name."""
        kind = find_kind(kind) if isinstance(kind, str) else kind
        return cls(name or kind.name, {kind: tuple(tuple(int(i) for i in site) for site in units)})

    def units(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """Ids of `kind` that it takes from `layer` (units of a shared kind are the same ones everywhere)."""
        return self.gone[kind][kind.site(layer)] if kind in self.gone else ()


@dataclass(frozen=True, eq=False)
class Architecture:
    """The live units of a model being pruned, ascending original ids; equal when shape and live ids are.

    Args:
        shape: the source model.
        live: for each prunable kind of the shape's table and each of its sites, the int32 ids of the live units (none
            in layers that are gone).
        serving: the same of kinds that follow others, where it is known already; else it is found when asked for.
    """

    shape: LlamaShape
    live: Mapping[Kind, tuple[np.ndarray, ...]]
    serving: Mapping[Kind, tuple[np.ndarray, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for kind in self.table.prunable:
            sites = self.live.get(kind, ())
            if len(sites) != kind.sites(self.shape):
                raise ValueError(f"live units of {kind} at {len(sites)} sites, not {kind.sites(self.shape)}")
            gone = () if kind.is_shared else set(range(len(sites))) - set(self.layers)
            if any(len(sites[layer]) for layer in gone):
                raise ValueError(f"live units of {kind} in layers that are gone")

    @classmethod
    def full(cls, shape: LlamaShape) -> Architecture:
        """The unpruned source model."""
        kinds = table_of(shape).prunable
        return cls(shape, {kind: _all_units(kind, shape) for kind in kinds})

    @property
    def table(self) -> ParamTable:
        """The parameters of a model of this shape."""
        return table_of(self.shape)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Original numbers of the layers that are left, ascending."""
        return tuple(self.live[LAYER][0].tolist())

    # Widths --------------------------------------------------------------------------------------------------------

    def sites(self, kind: Kind) -> tuple[np.ndarray, ...]:
        """Live original ids of `kind` at each of its sites, ascending int32."""
        if kind in self.live:
            return self.live[kind]
        if kind not in self._derived:
            self._derived[kind] = self._serving(kind) if kind.follows else _all_units(kind, self.shape)
        return self._derived[kind]

    @cached_property
    def _derived(self) -> dict[Kind, tuple[np.ndarray, ...]]:
        return dict(self.serving)

    def _serving(self, kind: Kind) -> tuple[np.ndarray, ...]:
        assert kind.follows is not None
        return tuple(_frozen(np.unique(kind.serving(ids, self.shape))) for ids in self.sites(kind.follows))

    def live_sites(self, kind: Kind) -> tuple[np.ndarray, ...]:
        """As `sites`, without those of layers that are gone, which are empty."""
        sites = self.sites(kind)
        return sites if kind.is_shared else tuple(sites[layer] for layer in self.layers)

    def ids(self, kind: Kind, layer: int) -> np.ndarray:
        """Live original ids of `kind` in `layer`, ascending int32."""
        return self.sites(kind)[kind.site(layer)]

    def width(self, kind: Kind, layer: int | None = None) -> int:
        """Live units of `kind` in `layer`; without a layer, in the one that has most."""
        return max(map(len, self.sites(kind))) if layer is None else len(self.ids(kind, layer))

    def widths(self, kinds: Iterable[Kind] | None = None) -> dict[str, int | list[int]]:
        """Live units by name of kind (of all that can vary, unless told), in the layers that are left: a number where
        all have as many."""
        chosen = self.table.varying if kinds is None else kinds
        counted = {kind.name: list(map(len, self.live_sites(kind))) for kind in chosen}
        return {name: counts[0] if len(set(counts)) == 1 else counts for name, counts in counted.items()}

    def clusters(self, kind: Kind) -> tuple[np.ndarray, ...]:
        """Per site of a kind that follows another: how many live units each of its live units serves, in order."""
        assert kind.follows is not None
        counts = (np.bincount(kind.serving(ids, self.shape)) for ids in self.sites(kind.follows))
        return tuple(served[served > 0] for served in counts)

    def elements(self, roles: tuple[str, ...] | None = None) -> int:
        """Live elements of all parameters, or of those of `roles` (see `ParamTable.elements`)."""
        return int(self.table.elements(self.counts, roles))

    @cached_property
    def counts(self) -> dict[Kind, np.ndarray]:
        """Live units of every kind of the table, int64 [sites]; of the layers, 1 or 0 for each."""
        counted = {kind: np.array([len(ids) for ids in self.sites(kind)], dtype=np.int64) for kind in self.table.kinds}
        return {**counted, LAYER: np.isin(np.arange(self.shape.num_layers), self.layers).astype(np.int64)}

    @cached_property
    def parameters(self) -> int:
        """Live parameters: padding and empty slots not counted, a tied LM head counted once."""
        return self.elements()

    def span(self, kind: Kind) -> str:
        """Live units of `kind` in a layer, for people: `9`, or `7 to 9` where layers differ."""
        counts = sorted(map(len, self.live_sites(kind)))
        return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"

    def described(self) -> str:
        """All widths for people: `query heads 9, KV heads 3, FFN channels 1536, hidden size 576`."""
        return ", ".join(f"{kind.title} {self.span(kind)}" for kind in self.table.varying)

    # In Megatron's and Hugging Face's nouns, of the widest layer:

    def _of_outputs(self, role: str, dim: int) -> int:
        dims = [(row.dims[dim], row.site) for row in self.table.rows if row.role == role]
        return max(self.width(d.kind, site) * d.size for d, site in dims)

    @property
    def num_attention_heads(self) -> int:
        """Live query heads of a layer."""
        return self._of_outputs(ATTENTION_OUTPUT, 1) // self.shape.kv_channels

    @property
    def ffn_hidden_size(self) -> int:
        """Live FFN channels of a layer."""
        return self._of_outputs(FFN_DOWN, 1)

    @property
    def hidden_size(self) -> int:
        """Live residual (stem) channels."""
        return self._of_outputs(ATTENTION_OUTPUT, 0)

    @property
    def kv_cache_channels(self) -> int:
        """Elements that a KV cache holds per token: keys and values of all layers."""
        return int(self.table.channels(self.counts, QKV, dim=0, after=1))

    # Removal -------------------------------------------------------------------------------------------------------

    def without(self, group: Group) -> Architecture:
        """The architecture after `group` is removed; every unit of it must be alive (asserted)."""

        def drop(live: np.ndarray, units: Sequence[int]) -> np.ndarray:
            if not units:
                return live
            wanted = np.array(units, dtype=live.dtype)  # for another type, all of `live` would be converted
            at = np.searchsorted(live, wanted)  # ids ascend
            kept = np.delete(live, at[live.take(at, mode="clip") == wanted])
            assert len(kept) == len(live) - len(units), f"{group.name} {units}: not all of them are alive"
            return _frozen(kept)

        changed = {
            kind: tuple(drop(ids, units) for ids, units in zip(self.live[kind], sites, strict=True))
            for kind, sites in group.gone.items()
        }
        serving = {kind: ids for kind, ids in self._derived.items() if kind.follows and kind.follows not in changed}
        return Architecture(self.shape, {**self.live, **changed}, serving)

    def leaving(self, group: Group, kind: Kind, layer: int) -> np.ndarray:
        """int32 ids of `kind` that leave `layer` with `group`: its own, or those that served only units of it."""
        if kind.follows is None or kind.follows not in group.gone:
            return np.array(group.units(kind, layer), dtype=np.int32)
        leaders, ids = self.ids(kind.follows, layer), self.ids(kind, layer)
        left = leaders[~holds(leaders, np.array(group.units(kind.follows, layer)))]
        still_serves = np.zeros(kind.size(self.shape), dtype=bool)
        still_serves[kind.serving(left, self.shape)] = True
        return ids[~still_serves[ids]]

    def cost(self, group: Group) -> int:
        """Parameters that leave with `group`, and with the units that served only units of it."""
        return self.parameters - self.without(group).parameters

    def renumbered(self) -> Architecture:
        """The layers that are left as those of a source that has no others, for whoever counts layers from 0 on."""
        without = (at for at, layer in enumerate(self.layers) if layer in self.shape.no_rope_layers)
        shape = dataclasses.replace(self.shape, num_layers=len(self.layers), no_rope_layers=tuple(without))
        live = dict(self.live)
        live[LAYER] = (_frozen(np.arange(shape.num_layers)),)
        return Architecture(shape, {k: live[k] if k.is_shared else self.live_sites(k) for k in self.table.prunable})

    # Identity and storage ------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hex digest of shape and live ids; equal on all ranks that agree."""
        digest = hashlib.sha256(repr(self.shape).encode())
        for kind in self.table.prunable:
            for ids in self.live[kind]:
                digest.update(np.ascontiguousarray(ids).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def to_json(self) -> dict[str, Any]:
        """Human-readable JSON object: widths, parameters, and live ids as ranges such as `0-17,19`."""
        live = {kind.name: [to_ranges(ids) for ids in self.live[kind]] for kind in self.table.prunable}
        return {
            "shape": self.shape.to_json(),
            "parameters": self.parameters,
            "widths": self.widths(),
            "live": {name: sites[0] if find_kind(name).is_shared else sites for name, sites in live.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """Inverse of `to_json`; raises `UserError` when the live ids do not fit the shape or the stated widths."""
        try:
            shape = LlamaShape.from_json(data["shape"])
            live = {LAYER.name: f"0-{shape.num_layers - 1}", **first_format.live(data["live"])}
            kinds = table_of(shape).prunable
            if set(live) != {kind.name for kind in kinds}:
                raise ValueError(f"live units of {', '.join(live)}, not of {', '.join(map(repr, kinds))}")
            result = cls(shape, {kind: _read_live(live[kind.name], kind, shape) for kind in kinds})
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"architecture.json: not an architecture of this project ({error!r})") from error
        for kind in kinds:
            size = kind.size(shape)
            for ids in result.live_sites(kind):
                if not len(ids) or ids[-1] >= size:
                    raise UserError(
                        f"architecture.json: live ids {to_ranges(ids)!r} do not fit the source's {size} units"
                    )
        if result.parameters != data.get("parameters", result.parameters):
            raise UserError(
                "architecture.json: `parameters` contradicts the live units; the file was edited or damaged"
            )
        return result


@functools.lru_cache(maxsize=64)
def _all_units(kind: Kind, shape: LlamaShape) -> tuple[np.ndarray, ...]:
    return (_frozen(np.arange(kind.size(shape))),) * kind.sites(shape)


def _read_live(sites: Any, kind: Kind, shape: LlamaShape) -> tuple[np.ndarray, ...]:
    sites = [sites] if kind.is_shared else sites
    if len(sites) != kind.sites(shape):
        raise ValueError(f"live units of other than {kind.sites(shape)} layers")
    return tuple(from_ranges(ids, kind.size(shape)) for ids in sites)


def _ids(values: Iterable[int]) -> np.ndarray:
    return _frozen(np.array(sorted(int(v) for v in values)))


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, dtype=np.int32)
    array.setflags(write=False)
    return array


def to_ranges(ids: np.ndarray) -> str:
    """`[0, 1, 2, 5]` -> `0-2,5`."""
    return ",".join(f"{first}" if first == last - 1 else f"{first}-{last - 1}" for first, last in runs(ids))


def from_ranges(text: str, size: int | None = None) -> np.ndarray:
    """Inverse of `to_ranges`; raises ValueError on malformed text, or for ids beyond `size`."""
    values: list[int] = []
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        if size is not None and int(last or first) >= size:
            raise ValueError(f"live ids {text!r} do not fit the source's {size} units")
        values.extend(range(int(first), int(last or first) + 1))
    if len(set(values)) != len(values):
        raise ValueError(f"repeated ids in {text!r}")
    return _ids(values)
