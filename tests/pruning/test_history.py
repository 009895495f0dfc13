"""The record of removals: back as it was written, cut at the checkpoint on resume, damage named by line."""

import dataclasses
import json
import math

import pytest

from megatron_prune.errors import UserError
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pruning.history import FILE_NAME, HistoryWriter, Removal, before, read_history
from megatron_prune.pruning.history_plot import plot_history

SHAPE = LlamaShape(2, 6, 8, 4, 2, 2, 8, 16)
GROUPS = [
    Group.of("ffn", ((3,), (0,))),
    Group.of("stem", ((5,),)),
    Group.of("head", ((0, 1), (2, 3))),
    Group.of("ffn", ((1,), (7,))),
]


def removals():
    architecture, found = Architecture.full(SHAPE), []
    for number, group in enumerate(GROUPS, start=1):
        architecture = architecture.without(group)
        found.append(
            Removal(
                iteration=number,
                tokens=128 * number,
                group=group,
                scores={"head": 1 / 3 + number, "ffn": 2.5e-7 / number},
                margin=None if number == 2 else math.pi / number,
                parameters=architecture.parameters,
                widths=architecture.widths(architecture.table.prunable),
            )
        )
    return found


def written(folder, so_far=(), more=()):
    writer = HistoryWriter(folder, list(so_far))
    for removal in more:
        writer.append(removal)
    writer.close()
    return folder / FILE_NAME


def test_what_was_written_is_read_again(tmp_path):
    path = written(tmp_path / "run", more=removals())
    assert read_history(path) == removals()
    assert [removal.group for removal in read_history(path)] == GROUPS
    architecture = Architecture.full(SHAPE)
    for removal in read_history(path):
        architecture = architecture.without(removal.group)
        assert architecture.parameters == removal.parameters


def test_a_line_of_the_first_format_is_read(tmp_path):
    removal = removals()[2]
    line = {name: value for name, value in removal.to_json().items() if name not in ("group", "gone", "widths")}
    line |= {
        "kind": "head",
        "units": [[0, 1], [2, 3]],
        "num_attention_heads": 2,
        "ffn_hidden_size": 7,
        "hidden_size": 5,
    }
    (tmp_path / FILE_NAME).write_text(json.dumps(line) + "\n")
    widths = {name: width for name, width in removal.widths.items() if name != "layer"}  # not counted then
    assert read_history(tmp_path / FILE_NAME) == [dataclasses.replace(removal, widths=widths)]


def test_each_line_is_on_disk_at_once_and_is_plain_json(tmp_path):
    writer, path = HistoryWriter(tmp_path, []), tmp_path / FILE_NAME
    for number, removal in enumerate(removals(), start=1):
        writer.append(removal)
        lines = path.read_text().splitlines()
        assert len(lines) == number and json.loads(lines[-1])["iteration"] == removal.iteration
    writer.close()


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path):
    first, second, third, fourth = removals()
    path = written(tmp_path, more=[first, second, third])
    written(tmp_path, so_far=[first, second], more=[fourth])
    assert read_history(path) == [first, second, fourth]
    assert [file.name for file in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "damaged",
    [
        *("{", '{"kind": "ffn"}', "[]", "5", '{"units": 3}', '{"units": [["x"]]}', '{"units": [], "colour": 1}'),
        *('{"gone": 3}', '{"group": "ffn", "gone": {"ffn": 3}}', '{"group": "ffn", "gone": {"colour": []}}'),
    ],
)
def test_a_damaged_line_is_named(tmp_path, damaged):
    path = written(tmp_path, more=removals())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damaged, *lines[2:]]))
    with pytest.raises(UserError, match=rf"{FILE_NAME}:3: not a line of a pruning history"):
        read_history(path)


def test_a_line_cut_short_by_a_crash_is_named(tmp_path):
    path = written(tmp_path, more=removals())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=rf"{FILE_NAME}:4"):
        read_history(path)


def figures(history, folder, monkeypatch):
    """(saliencies, widths) of what is drawn: the axes of each figure."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    architecture = Architecture.full(SHAPE)
    for removal in history:
        architecture = architecture.without(removal.group)
    paths = plot_history(history, architecture, folder)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths) and len(paths) == 2
    return [figure.axes[0] for figure in drawn]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def test_the_widths_start_from_the_source(tmp_path, monkeypatch):
    history = removals()
    _, axes = figures(history, tmp_path, monkeypatch)
    full = Architecture.full(SHAPE)
    assert labels(axes) == [
        "query heads (4 to 2)",
        "FFN channels (8 to 6)",
        "hidden size (6 to 5)",
        f"parameters ({full.parameters:,} to {history[-1].parameters:,})",
    ]
    for line in axes.get_lines():
        assert list(line.get_xdata()) == [0, 128, 256, 384, 512] and line.get_ydata()[0] == 1


def test_what_a_model_was_before_its_removals():
    architecture = Architecture.full(SHAPE)
    start = architecture.without(Group.of("stem", ((2,),)))  # of a run before, whose history is not at hand
    after = start
    for group in GROUPS:
        after = after.without(group)
    assert before(after, removals()) == start and before(start, []) == start


def test_the_saliencies_say_what_could_not_be_chosen(tmp_path, monkeypatch):
    first, *others = removals()
    history = [
        dataclasses.replace(first, scores={"head": 4e-7, "ffn": 1e-7}),
        dataclasses.replace(others[1], scores={"head": 3e-7, "ffn": 2e-7}),  # a head, though a channel costs less
        dataclasses.replace(others[2], scores={"ffn": 0.0}),
    ]
    axes, _ = figures(history, tmp_path, monkeypatch)
    assert labels(axes) == [
        "head, at its floor after 384 training tokens",
        "ffn, 1 of 3 not above 0",
        "stem: off, or at its floor",
        "removed",
        "less salient, but had to wait (target, balance, limit)",
    ]
    assert list(axes.get_lines()[-1].get_ydata()) == [2e-7]


def test_saliencies_below_zero_are_drawn(tmp_path, monkeypatch):
    first, *others = removals()
    history = [
        dataclasses.replace(first, scores={"head": 4e-7, "ffn": -1e-7, "stem": 0.0}),
        dataclasses.replace(others[0], scores={"head": 3e-7, "ffn": 2e-7, "stem": -2e-7}),
    ]
    axes, _ = figures(history, tmp_path, monkeypatch)
    assert axes.get_yscale() == "symlog"
    assert [list(line.get_ydata()) for line in axes.get_lines()[:3]] == [[4e-7, 3e-7], [-1e-7, 2e-7], [0.0, -2e-7]]


def test_removals_without_training_are_drawn_one_by_one(tmp_path, monkeypatch):
    first, second, *others = removals()
    at_once = [dataclasses.replace(removal, tokens=0) for removal in removals()]
    earlier = [first, second, *(dataclasses.replace(removal, tokens=0) for removal in others)]
    for history in (at_once, earlier):  # the second: a trained model, pruned on at once
        for axes in figures(history, tmp_path, monkeypatch):
            assert axes.get_xlabel() == "removed groups" and max(axes.get_lines()[1].get_xdata()) == 4
