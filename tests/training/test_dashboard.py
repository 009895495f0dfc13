"""The dashboard: what it shows, and that it redraws in place."""

import io
import math
import sys

import pytest

from megatron_prune.training.dashboard import Dashboard, Snapshot, render, sparkline

SNAPSHOT = Snapshot(
    iteration=500,
    total_iterations=1000,
    consumed_tokens=512_000,
    parameters=(200_000, 150_000, 100_000),
    widths={"heads": (8, 6), "ffn": (172, 86)},
    losses=(3.0, 2.0, 1.5),
    saliencies=(1e-7, 2e-7),
    facts={"tokens/s": "12,345", "MFU": "41.0%"},
    seconds={"scoring": 0.002, "forward-backward": 0.1, "compact": 0.00001},
)


def test_everything_is_on_it():
    lines = render(SNAPSHOT)
    text = "\n".join(lines)
    assert "500 of 1,000, 512,000 tokens" in text
    assert "150,000 (200,000 to 100,000)" in text and "6 of 8" in text and "86 of 172" in text
    assert "1.5000" in text and "2.00e-07" in text and "tokens/s 12,345 | MFU 41.0%" in text
    assert text.endswith("forward-backward 100.0 | scoring 2.0"), "the longest part first, none that takes no time"
    assert lines[1].count("█") == lines[1].count("░") == 15, "half of the way to the target"


def test_without_pruning_and_before_anything_is_known():
    lines = render(Snapshot(0, 0, 0, (10, 10, None), {}, ()))
    assert lines[1] == "parameters  10" and len(lines) == 2


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁" and sparkline([1, math.nan, 2]) == "▁ █" and sparkline([]) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in {"TERM": "xterm", "COLUMNS": "40", "LINES": "50"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


UP, ERASE = "\x1b[1A", "\x1b[2K"


def test_it_is_redrawn_in_place_with_messages_above(terminal):
    dashboard = Dashboard(terminal)
    assert dashboard.is_due()
    dashboard.draw(SNAPSHOT)
    assert not dashboard.is_due() and UP not in terminal.getvalue()
    drawn = terminal.getvalue()
    dashboard.write("saved [bold]iter_0000003[/bold] " + 50 * "x")
    after = terminal.getvalue().removeprefix(drawn)
    erased, shown = after.split("saved [bold]iter_0000003[/bold] " + 50 * "x" + "\n")
    assert erased.count(UP) == len(render(SNAPSHOT)) and erased.endswith(ERASE) and "iteration" not in erased
    assert "iteration" in shown and UP not in shown
    dashboard.close()
    ended = terminal.getvalue()
    dashboard.write("the end")
    assert terminal.getvalue() == ended + "the end\n"


def test_it_fits_the_terminal_and_leaves_the_cursor(terminal):
    dashboard = Dashboard(terminal)
    dashboard.draw(SNAPSHOT)
    shown = terminal.getvalue()
    dashboard.close()
    lines = shown.split("\x1b[?25h")[-1].splitlines()
    assert len(lines) == len(render(SNAPSHOT)) and max(map(len, lines)) == 40
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "a run that is killed now leaves it visible"


def test_warnings_of_others_scroll_above_it(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    dashboard = Dashboard(terminal)
    dashboard.draw(SNAPSHOT)
    drawn = terminal.getvalue()
    print("careful", file=sys.stderr)
    erased, shown = terminal.getvalue().removeprefix(drawn).split("careful\n")
    assert UP in erased and "iteration" in shown
    dashboard.close()
    assert sys.stderr is terminal


def test_elsewhere_there_are_plain_lines_only():
    log = io.StringIO()
    dashboard = Dashboard(log)
    dashboard.draw(SNAPSHOT)
    dashboard.write("iteration 1 | " + 200 * "x")
    dashboard.draw(SNAPSHOT)
    assert log.getvalue() == "iteration 1 | " + 200 * "x" + "\n"
    dashboard.close()
    assert "500 of 1,000" in log.getvalue() and "\x1b" not in log.getvalue()
