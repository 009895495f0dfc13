"""The dashboard: what it shows, and that it redraws in place."""

import io
import math

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
    lines = render(SNAPSHOT, 200)
    text = "\n".join(lines)
    assert "500 of 1,000, 512,000 tokens" in text
    assert "150,000 (200,000 to 100,000)" in text and "6 of 8" in text and "86 of 172" in text
    assert "1.5000" in text and "2.00e-07" in text and "tokens/s 12,345 | MFU 41.0%" in text
    assert text.endswith("forward-backward 100.0 | scoring 2.0"), "the longest part first, none that takes no time"
    assert lines[1].count("█") == lines[1].count("░") == 15, "half of the way to the target"


def test_it_fits_the_terminal():
    assert all(len(line) <= 40 for line in render(SNAPSHOT, 40))


def test_without_pruning_and_before_anything_is_known():
    lines = render(Snapshot(0, 0, 0, (10, 10, None), {}, ()), 100)
    assert lines[1] == "parameters  10" and len(lines) == 2


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁" and sparkline([1, math.nan, 2]) == "▁ █" and sparkline([]) == ""


def test_it_is_redrawn_in_place_with_messages_above():
    stream = io.StringIO()
    dashboard = Dashboard(stream, 100)
    assert dashboard.is_due()
    dashboard.draw(SNAPSHOT)
    assert not dashboard.is_due() and "\x1b" not in stream.getvalue()
    lines = stream.getvalue().count("\n")
    dashboard.write("saved checkpoint")
    erased, after = stream.getvalue().split(f"\x1b[{lines}F\x1b[J")
    assert "saved" not in erased and after.startswith("saved checkpoint\n") and after.count("\n") == lines + 1
    dashboard.close()
    dashboard.write("the end")
    assert stream.getvalue().endswith("the end\n") and stream.getvalue().count("\x1b[J") == 1
