"""Reports of real runs, opened in a real browser: they load, their slider moves the model, two runs compare."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from megatron_prune.checkpoint.record import RunRecord
from megatron_prune.commands import main
from megatron_prune.model.architecture import Architecture, Group
from megatron_prune.model.kinds import find_kind
from megatron_prune.model.shape import LlamaShape
from megatron_prune.pretrain import main as pretrain
from megatron_prune.pruning.history import Removal, read_history
from megatron_prune.report.html_page import render
from megatron_prune.report.story import ABSENT, LIVES, Story, read_story, thin
from megatron_prune.testing.benchmarks.kills import victim
from megatron_prune.testing.helpers.ranks import watch_ranks
from megatron_prune.testing.helpers.tiny_runs import prepare
from tests.report.browser import Browser, needs_browser

needs_plotly = pytest.mark.skipif(find_spec("plotly") is None, reason="needs plotly (the extra `report`)")


def run(words):
    (fate,) = watch_ranks(victim, 1, pretrain, [str(word) for word in words])
    assert fate.exit_code == 0, fate.output
    return fate.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs of one source that were set up differently."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = prepare(folder / "files")
    run(tiny.arguments(folder / "one", "--save-interval", 5, "--eval-interval", 5))
    whole = ("--prune-ratio", "null", "--prune-curve", "end=80%", "--train-iters", 20, "--continue-tokens", 0)
    run(tiny.arguments(folder / "two", *whole, "--continue-lr-warmup-iters", 0, "--lr", "1e-3", "--report"))
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


# What a story holds ---------------------------------------------------------------------------------------------------


def test_a_story_says_what_the_run_recorded(runs):
    story, record = read_story(runs[0]), RunRecord.read(runs[0])
    history = read_history(runs[0] / "pruning_history.jsonl")
    assert story.arrays["x"].tolist() == [removal.tokens for removal in history]
    assert story.arrays["parameters"].tolist() == [removal.parameters for removal in history]
    architecture = Architecture.full(record.architecture.shape)
    assert story.facts["parameters"] == [architecture.parameters] * 2 + [record.architecture.parameters]
    for number, removal in enumerate([*history, None]):  # the shape before every removal, and at the end
        for kind in architecture.table.prunable:
            left = story.arrays[f"left/{kind}"].reshape(kind.sites(architecture.shape), -1)
            for site, ids in zip(left, architecture.sites(kind), strict=True):
                assert np.flatnonzero((site == LIVES) | ((site != ABSENT) & (site >= number))).tolist() == ids.tolist()
        architecture = architecture if removal is None else architecture.without(removal.group)
    assert architecture == record.architecture
    loss = story.arrays["value/lm loss"]
    assert len(loss) == record.iteration and story.arrays["at/lm loss"][-1] == record.state["consumed_tokens"]
    assert [one["iteration"] for one in story.facts["checkpoints"]] == sorted(
        {*range(5, record.iteration, 5), record.iteration}
    )
    assert {"source", "pruned", "final"} == set(story.facts["stages"])
    changed = {name for name, _, is_default in story.facts["settings"] if not is_default}
    assert {"pruning.target_params", "optimizer.lr", "checkpoint.save"} <= changed


def test_a_run_that_goes_on_is_told_as_far_as_it_is(runs, tmp_path):
    """A checkpoint that is older than the history's end, and a line of which only half is written."""
    whole, half = read_story(runs[0]), tmp_path / "half"
    half.mkdir()
    for name in ("iter_0000005", "config.yaml", "tensorboard"):
        (half / name).symlink_to(runs[0] / name)
    (half / "latest_checkpointed_iteration.txt").write_text("5\n")
    lines = (runs[0] / "pruning_history.jsonl").read_text().splitlines(keepends=True)
    (half / "pruning_history.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
    story = read_story(half)
    assert len(story.arrays["x"]) == len(lines) - 2
    assert story.facts["parameters"][2] == json.loads(lines[-3])["parameters"]
    assert story.facts["parameters"][:2] == whole.facts["parameters"][:2]


def test_files_that_are_damaged_are_one_line(runs, tmp_path, capsys):
    other = tmp_path / "run"
    other.mkdir()
    for path in runs[0].iterdir():
        (other / path.name).symlink_to(path)
    (other / "pruning_history.jsonl").unlink()
    (other / "pruning_history.jsonl").write_text(
        (runs[0] / "pruning_history.jsonl").read_text().replace("[[", "[[9", 1)
    )
    for folder, told in (
        (other, "not what a run writes"),
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no complete"),
    ):
        assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and (told in error or "plotly" in error), error
    assert not (tmp_path / "page.html").exists()


def test_a_thinned_curve_keeps_its_peaks():
    values = np.zeros(100_000)
    values[[777, 50_001]] = 5, -7
    kept = thin(values, 1000)
    assert len(kept) <= 1002 and {0, 777, 50_001, 99_999} <= set(kept.tolist())
    assert thin(values[:900], 1000).tolist() == list(range(900))


# In the browser -------------------------------------------------------------------------------------------------------

LIVE_CELLS = """[...document.querySelectorAll('.js-plotly-plot')].map((p) => p.data.filter((t) => t.type === 'heatmap'))
  .filter((maps) => maps.length).map((maps) => maps.map((t) => t.z.flat().filter((v) => v !== null).length))"""


def move(browser, place):
    """Move the slider and wait until the model is drawn; live cells of every picture, by run."""
    browser.ask(f"""(async () => {{ const slider = document.getElementById('when'); slider.value = {place};
      slider.dispatchEvent(new Event('input'));
      await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50))); }})()""")
    return browser.ask(LIVE_CELLS)


@needs_plotly
@needs_browser
def test_the_report_written_at_the_end_of_a_run_opens_without_complaint(runs, browser):
    assert (runs[1] / "report.html").is_file() and not (runs[0] / "report.html").exists(), "--report, --no-report"
    browser.open(runs[1] / "report.html")
    assert browser.complaints == []
    text = browser.ask("document.body.innerText")
    for heading in (
        "The model’s shape",
        "Training",
        "What left, and why",
        "How close the decisions were",
        "Where the time goes",
        "Stages",
        "Configuration",
        "Checkpoints",
    ):
        assert heading in text
    story = read_story(runs[1])
    assert f"{story.facts['parameters'][2]:,}" in text and "finished" in text
    assert browser.ask("document.querySelectorAll('a[href], img, link').length") == 0, "link-free"


@needs_plotly
@needs_browser
def test_the_slider_shows_the_model_at_any_token(runs, browser, tmp_path):
    path = tmp_path / "page.html"
    assert main(["report", str(runs[0]), "--output", str(path)]) == 0
    browser.open(path)
    story, record = read_story(runs[0]), RunRecord.read(runs[0])
    x = story.arrays["x"]
    kinds = record.architecture.table.prunable

    def expected(token):
        count = int((x <= token).sum())
        live = [story.arrays[f"left/{kind}"] for kind in kinds]
        return [int(((ids == LIVES) | ((ids != ABSENT) & (ids >= count))).sum()) for ids in live]

    for place in (0, 700, 1400, 2000):
        assert move(browser, place) == [expected(x[-1] * place / 2000)], place
    assert expected(0) != expected(x[-1] / 2) != expected(x[-1]), "the slider has something to show"
    said = browser.ask("document.querySelector('.meters').innerText")
    assert f"{record.architecture.parameters:,} of " in said
    assert browser.complaints == []


@needs_plotly
@needs_browser
def test_two_runs_are_compared(runs, browser, tmp_path):
    path = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(path)]) == 0
    browser.open(path)
    first = move(browser, 600)
    assert len(first) == 2 and first[0] != first[1], "each run's shape at the same token"
    names = browser.ask(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap((p) => p.data.map((t) => t.name || ''))"
    )
    assert {"one: training loss, smoothed", "two: training loss, smoothed"} <= set(names)
    rows = browser.ask("[...document.querySelectorAll('td.differs')].map((d) => d.parentNode.innerText)")
    assert any(row.startswith("optimizer.lr\t") and "0.002\t0.001" in row for row in rows), rows
    assert not any(row.startswith("data.seq_length") for row in rows), "equal settings are not among them"
    assert browser.complaints == []
    browser.print(tmp_path / "both.pdf")
    assert (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF")
    assert browser.complaints == []


def write_long_run(folder, removals, layers):
    """What is left of a run that took one FFN channel out of every layer, again and again."""
    shape = LlamaShape(layers, 4096, removals + 1000, 32, 8, 128, 32000, 4096)
    ffn, random = find_kind("ffn"), np.random.default_rng(0)
    full = Architecture.full(shape)
    order = np.stack([random.permutation(removals + 1000)[:removals] for _ in range(layers)], axis=1)
    cost, widths = full.cost(Group.of(ffn, order[:1].T)), full.widths(full.table.prunable)
    scores = 1e-6 * np.exp(random.normal(size=(removals, 3)))
    with (folder / "pruning_history.jsonl").open("w") as file:
        for number, (units, row) in enumerate(zip(order.tolist(), scores.tolist(), strict=True)):
            removal = Removal(
                number + 1,
                4096 * (number + 1),
                Group.of(ffn, [[unit] for unit in units]),
                dict(zip(("head", "ffn", "stem"), row, strict=True)),
                row[0],
                full.parameters - (number + 1) * cost,
                {**widths, "ffn": removals + 1000 - number - 1},
            )
            file.write(json.dumps(removal.to_json()) + "\n")
    live = tuple(np.setdiff1d(np.arange(removals + 1000), gone).astype(np.int32) for gone in order.T)
    (folder / "iter_0000001").mkdir()
    final = Architecture(shape, {**full.live, ffn: live})
    (folder / "iter_0000001" / "architecture.json").write_text(json.dumps(final.to_json()))
    (folder / "latest_checkpointed_iteration.txt").write_text("1\n")


@needs_plotly
@needs_browser
def test_fifty_thousand_removals_open_quickly(browser, tmp_path):
    """Below 10 MB, and below 3 s of a processor's time (what a busy machine lets it wait is not counted)."""
    write_long_run(tmp_path, 50_000, 16)
    path = tmp_path / "long.html"
    path.write_text(render([read_story(tmp_path)]))
    assert path.stat().st_size < 10e6
    browser.call("Performance.disable")
    browser.call("Performance.enable", timeDomain="threadTicks")
    browser.open(path)
    metrics = {one["name"]: one["value"] for one in browser.call("Performance.getMetrics")["metrics"]}
    assert metrics["TaskDuration"] < 3, metrics
    assert move(browser, 1000)[0][1] > move(browser, 2000)[0][1] > 0
    assert browser.complaints == []


@needs_plotly
@needs_browser
def test_names_from_strangers_are_text(runs, browser, tmp_path):
    story, evil = read_story(runs[0]), "</title></script><script>window.broken = true</script><img src=x>"
    path = tmp_path / "page.html"
    path.write_text(render([Story({**story.facts, "name": evil, "source": evil}, story.arrays)]))
    browser.open(path)
    assert browser.ask("window.broken") is None and evil in browser.ask("document.body.innerText")
    assert browser.complaints == []
