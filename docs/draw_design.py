"""Draws docs/design_*.svg from the code itself: `python docs/draw_design.py` writes them beside this file.

    touched    which rows and columns of a layer's parameters a group takes (`Param.group_positions`)
    slots      slots on two ranks: packed, with a retired group, compacted (`ShardLayout`)
    iteration  one pruning-aware iteration
    rooms      which room imports which (the packages' sources)

Plain SVG text, so that the files are the same everywhere; a test compares them with what this module makes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import FFN, HEAD, KV_HEAD, STEM, VOCAB
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.shape import LlamaShape
from megatron_prune.model.table import EMPTY

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "megatron_prune"
INK, PALE, RED, BLUE, GREY = "#222222", "#e8eef4", "#d1495b", "#30638e", "#bbbbbb"


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", weight: str = "normal") -> str:
    """A line of text with its baseline at `y`."""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}" fill="{INK}">{words}</text>'
    )


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = INK, thin: float = 0.8) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{edge}" '
        f'stroke-width="{thin:g}"/>'
    )


def svg(width: float, height: float, parts: list[str]) -> str:
    """The whole drawing on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    return "\n".join([head, box(0, 0, width, height, "white", "white"), *parts, "</svg>"]) + "\n"


def touched() -> str:
    """One layer of a small model, three times; what leaves is red."""
    shape = LlamaShape(1, 12, 16, 4, 2, 2, 20, 8, tie_word_embeddings=True)
    full = Architecture.full(shape)
    layout = ShardLayout.pack(full, 1, {VOCAB: 1})
    groups = {
        "head group: query heads 2 and 3, all that KV head 1 serves": Group.of(HEAD, ((2, 3),)),
        "ffn group: channel 5 of every layer": Group.of(FFN, ((5,),)),
        "stem group: residual channel 7, everywhere": Group.of(STEM, ((7,),)),
    }
    unit, parts, y = 6, [], 30.0
    for title, group in groups.items():
        parts.append(text(10, y, title, 13, weight="bold"))
        x, y = 10.0, y + 14
        for row in full.table.rows:
            rows, *columns = row.local_shape(layout)
            gone = row.group_positions(group, layout, 0)
            width = columns[0] if columns else 1
            parts.append(box(x, y, width * unit, rows * unit, PALE))
            parts += [box(x, y + at * unit, width * unit, unit, RED, RED, 0) for at in gone[0]]
            parts += [box(x + at * unit, y, unit, rows * unit, RED, RED, 0) for at in (gone[1] if columns else ())]
            short = row.name.removeprefix("decoder.").removeprefix("layers.0.").removesuffix(".weight")
            parts.append(text(x, y + rows * unit + 12, short.split(".")[-1], 9))
            x += max(width * unit, len(short.split(".")[-1]) * 5.2) + 18
        y += 20 * unit + 12 * unit + 50
    return svg(770, y - 20, parts)


def slots() -> str:
    """FFN channels and heads of one layer on two ranks."""
    shape = LlamaShape(1, 8, 10, 6, 3, 2, 8, 8)
    packed = ShardLayout.pack(Architecture.full(shape), 2, {FFN: 2, VOCAB: 1})
    retired = packed.without(Group.of(FFN, ((3,),))).without(Group.of(FFN, ((8,),))).without(Group.of(HEAD, ((4, 5),)))
    stages = {
        "packed: contiguous ranges, padded to the quantum (2 for FFN channels)": packed,
        "FFN channels 3 and 8 and the heads of KV head 2 have retired: empty slots, nothing moved": retired,
        "compacted: as if it had been packed like this from the start": retired.compacted(),
    }
    parts, y, size = [], 28.0, 26
    for title, layout in stages.items():
        parts.append(text(10, y, title, 13, weight="bold"))
        for kind, colour in ((FFN, "#cfe3d4"), (HEAD, "#cfdcec"), (KV_HEAD, "#f2e2c4")):
            y += size + 10
            parts.append(text(10, y, kind.title))
            for rank in range(2):
                x = 165.0 + rank * 310
                parts.append(text(x - 8, y, f"rank {rank}", 11, anchor="end"))
                for at, unit in enumerate(layout.slots(kind, 0, rank).tolist()):
                    fill, edge = (colour, INK) if unit != EMPTY else ("white", GREY)
                    parts.append(box(x + at * size, y - 18, size, size, fill, edge))
                    words = str(unit) if unit != EMPTY else ""
                    parts.append(text(x + (at + 0.5) * size, y - 1, words, 12, anchor="middle"))
        y += 46
    return svg(760, y - 10, parts)


STEPS = (
    ("forward, backward", "hooks of a Scoring watch\nmicro-batch gradients, inputs", 170),
    ("score", "S at (w_t, g_t) of\nowned elements", 110),
    ("optimizer step", "clip, Adam;\nskipped if not finite", 120),
    ("sum, choose", "one number per unit;\nrank 0 decides, all agree", 150),
    ("update, retire", "survivors take over;\nslots become zero", 130),
    ("compact", "only when a quantum\nis free", 135),
    ("log, save, stop", "agreed by all ranks", 120),
)


def iteration() -> str:
    """Boxes from left to right; what only some iterations do is pale red."""
    parts, x = [text(10, 24, "One iteration; red: only when a group is due", 13, weight="bold")], 10.0
    for title, words, width in STEPS:
        rare = title in ("score", "sum, choose", "update, retire", "compact")
        parts.append(box(x, 40, width, 70, "#f6dfe2" if rare else PALE))
        parts.append(text(x + 8, 60, title, 12, weight="bold"))
        parts += [text(x + 8, 78 + 15 * n, line, 10) for n, line in enumerate(words.split("\n"))]
        x += width + 14
        if title != STEPS[-1][0]:
            parts.append(f'<path d="M{x - 13:g} 75 h9 m-4 -4 l4 4 l-4 4" fill="none" stroke="{INK}"/>')
    return svg(x, 125, parts)


def imported_rooms(room: str) -> Iterator[str]:
    """Rooms that the modules of `room` import."""
    place = PACKAGE / room
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                head, _, rest = name.partition(".")
                if head == "megatron_prune" and rest:
                    yield rest.split(".")[0]


def rooms() -> str:
    """A row per room, a column per room that it imports."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    names = [line.split()[0] for line in docstring.splitlines() if line.startswith("    ")]
    used = {name: set(imported_rooms(name)) for name in names}
    size, left, top = 26, 100, 110
    parts = [text(10, 24, "A filled square: the room in this row imports the one in this column", 13, weight="bold")]
    for number, name in enumerate(names):
        x, y = left + number * size, top + number * size
        parts.append(text(left - 8, y + 18, name, 12, anchor="end"))
        parts.append(f'<g transform="translate({x + 17:g},{top - 6}) rotate(-60)">{text(0, 0, name, 11)}</g>')
        for other in range(len(names)):
            is_used = names[other] in used[name] and other != number
            fill = BLUE if is_used else ("#f4f4f4" if other < number else "white")
            parts.append(box(left + other * size, y, size, size, fill, GREY, 0.5))
    return svg(left + len(names) * size + 60, top + len(names) * size + 14, parts)


DRAWINGS = {f"design_{make.__name__}.svg": make for make in (touched, slots, iteration, rooms)}

if __name__ == "__main__":
    for name, make in DRAWINGS.items():
        (HERE / name).write_text(make(), encoding="utf-8")
