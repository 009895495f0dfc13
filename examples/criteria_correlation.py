"""How well do criteria predict what removing a unit does to the loss? Measured; see docs/criteria_correlation.md.

    python examples/criteria_correlation.py --hf-model DIR --text FILE --output-dir OUT [--skip-training]

Correlation: every query head, a sample of FFN channels of each layer and every stem channel of the model is removed
alone, exactly, and the loss is measured on the batch that was scored and on held-out text. Spearman's rank correlation
of these true changes with each registered criterion, and with the signed prediction -w g + w^2 F / 2 summed over the
unit's output weights, goes into a table and a figure.

One-shot pruning: the model is pruned to half by each criterion with tools/prune_once's code, without any training.
Then, unless --skip-training is given, the same number of tokens is trained on three ways: pruning inside the training,
and after one-shot pruning by `taylor_mix` and by the criterion that had the least loss.

Everything is written to OUT: tables.md, criteria_correlation.png, runs. Half an hour on one CPU core; what is in OUT
already (true changes, pruned models, runs) is not computed again, so that a new criterion costs a minute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.model.kinds import find_kind

SEQUENCE, CALIBRATION, HELD_OUT, FFN_SAMPLE = 256, 64, 64, 32
TARGET_SHARE, STEPS, BATCH = 0.5, 600, 8
KINDS = {
    "head": "heads",
    "head within": "heads within a layer",
    "ffn": "FFN",
    "ffn within": "FFN within a layer",
    "stem": "stem",
}
FIRST, SECOND, BOTH = "signed, first order", "signed, second order", "signed, both orders"
PER_TOKEN, ABSOLUTE = ", Fisher per token", "absolute value of the signed sum, first order"


@dataclass(frozen=True)
class CorrelationOptions:
    """Its options."""

    hf_model: str = option(None, "Hugging Face folder of the model", metavar="DIR", required=True)
    text: str = option(
        None, "text of the model's kind; documents are split by blank lines", metavar="FILE", required=True
    )
    output_dir: str = option(
        None, "where tables, figure and runs go; data sets are kept there", metavar="OUT", required=True
    )
    skip_training: bool = option(False, "only the correlation and pruning without training")


# Correlation ----------------------------------------------------------------------------------------------------------


def register_signed_predictions() -> None:
    """The loss change that a quadratic model with a diagonal Hessian predicts, element by element and with its sign."""
    from megatron_prune.saliency.criteria import criterion

    terms: dict[str, Callable[[Any], torch.Tensor]] = {
        FIRST: lambda e: -e.weight * e.gradient,
        SECOND: lambda e: e.weight.square() * e.fisher / 2,
        BOTH: lambda e: -e.weight * e.gradient + e.weight.square() * e.fisher / 2,
    }
    for name, term in terms.items():
        criterion(name, needs={"gradient", "fisher"})(term)


@dataclass
class Changes:
    """True changes of the loss, on the scored batch and on held-out text, by (kind, layer, position of the unit)."""

    units: list[tuple[str, int, int]] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


def true_changes(model: Any, losses: Callable[[], tuple[float, float]]) -> Changes:
    """Remove one unit at a time, measure, put it back."""
    a = model.architecture
    base, changes, random = losses(), Changes(), np.random.default_rng(0)
    jobs = [("head", layer, unit) for layer in range(a.shape.num_layers) for unit in range(a.num_attention_heads)]
    for layer in range(a.shape.num_layers):
        sample = random.choice(a.ffn_hidden_size, min(FFN_SAMPLE, a.ffn_hidden_size), replace=False)
        jobs += [("ffn", layer, int(unit)) for unit in np.sort(sample)]
    jobs += [("stem", 0, unit) for unit in range(a.hidden_size)]
    for kind, layer, unit in tqdm(jobs, desc="removing units one at a time", disable=not sys.stderr.isatty()):
        with removed(model, kind, layer, unit):
            found = losses()
        changes.units.append((kind, layer, unit))
        changes.scored.append(found[0] - base[0])
        changes.held_out.append(found[1] - base[1])
    assert losses() == base, "everything was put back"
    return changes


@contextlib.contextmanager
def removed(model: Any, kind: str, layer: int, unit: int) -> Iterator[None]:
    """Without one unit: a head or channel loses its output weights, which is all it does; a stem channel is retired."""
    from megatron_prune.model.architecture import Group
    from megatron_prune.model.llama import bind_layout
    from megatron_prune.resharding.live import zero_units

    parameters = dict(model.module.named_parameters())
    before, layout = {name: p.data.clone() for name, p in parameters.items()}, model.layout
    if kind == "stem":
        group = Group.of(kind, ((unit,),))
        zero_units(model, group, layout)
        bind_layout(model.module, layout.without(group), model.mesh)
    else:
        which = "self_attention.linear_proj" if kind == "head" else "mlp.linear_fc2"
        width = layout.architecture.shape.kv_channels if kind == "head" else 1
        parameters[f"decoder.layers.{layer}.{which}.weight"].data[:, unit * width : (unit + 1) * width] = 0
    yield
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
    bind_layout(model.module, layout, model.mesh)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank. NaN where one side does not vary."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    if min(np.ptp(r) for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(scores: Any, changes: Changes, truth: Sequence[float]) -> dict[str, float]:
    """Spearman's correlation per kind; `... within` is the mean over layers of each layer's own."""
    true, kinds = np.array(truth), np.array([kind for kind, _, _ in changes.units])
    layers = np.array([layer for _, layer, _ in changes.units])
    values = np.array([scores.of(find_kind(kind), layer)[unit] for kind, layer, unit in changes.units])
    found = {kind: spearman(values[kinds == kind], true[kinds == kind]) for kind in ("head", "ffn", "stem")}
    for kind in ("head", "ffn"):
        masks = [(kinds == kind) & (layers == layer) for layer in np.unique(layers[kinds == kind])]
        found[f"{kind} within"] = float(np.mean([spearman(values[mask], true[mask]) for mask in masks]))
    return {kind: found[kind] for kind in KINDS}


def all_scores(config: Any, run: Any, names: Sequence[str]) -> dict[str, Any]:
    """{row of the table: unit scores}: signed predictions, the absolute first-order sum, then the criteria `names`."""
    from megatron_prune.saliency.scores import UnitScores
    from megatron_prune.training.one_shot import OneShot

    per_token = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, fisher_unit="token"))
    usual, token = (OneShot(c, run.model, run.datasets.train) for c in (config, per_token))
    scores = {name: usual.unit_scores(name) for name in (FIRST, SECOND, BOTH)}
    scores[BOTH + PER_TOKEN] = token.unit_scores(BOTH)
    first = scores[FIRST]
    absolute = {kind: tuple(np.abs(values) for values in sites) for kind, sites in first.values.items()}
    scores[ABSOLUTE] = UnitScores(first.architecture, absolute)
    scores |= {f"`{name}`": usual.unit_scores(name) for name in names if name != "random"}
    return scores | {f"`taylor_mix`{PER_TOKEN}": token.unit_scores("taylor_mix")}


def correlate(config: Any, names: Sequence[str], output: Path) -> list[str]:
    """Score by everything, remove everything; lines of the table."""
    from megatron_prune.data.batches import BatchStream
    from megatron_prune.launch.assembly.one_shot_run import opened
    from megatron_prune.training.step import evaluate

    measured = output / "changes.json"
    with opened(config) as run:

        def mean_loss(dataset: Any, sequences: int) -> float:
            return evaluate(run.model, BatchStream(dataset, 16, 0, 1), sequences // 16, 16, SEQUENCE)

        def losses() -> tuple[float, float]:
            return mean_loss(run.datasets.train, CALIBRATION), mean_loss(run.datasets.valid, HELD_OUT)

        scores = all_scores(config, run, names)
        if measured.exists():
            stored = json.loads(measured.read_text())
            changes = Changes([(k, layer, unit) for k, layer, unit in stored.pop("units")], **stored)
        else:
            changes = true_changes(run.model, losses)
            measured.write_text(json.dumps(dataclasses.asdict(changes)) + "\n")
    found = [
        {name: correlations(units, changes, truth) for name, units in scores.items()}
        for truth in (changes.scored, changes.held_out)
    ]
    draw(scores[BOTH], changes, found[0], output)
    lines = ["| removed unit | units | median loss change | least | greatest |", "| --- | --- | --- | --- | --- |"]
    for kind in ("head", "ffn", "stem"):
        c = [change for (k, _, _), change in zip(changes.units, changes.scored) if k == kind]
        lines.append(f"| {KINDS[kind]} | {len(c)} | {np.median(c):.4f} | {min(c):.4f} | {max(c):.4f} |")
    lines += ["", "| score | " + " | ".join(KINDS.values()) + " |", "| --- |" + " --- |" * len(KINDS)]
    for name in scores:
        cells = [f"{found[0][name][kind]:.2f} / {found[1][name][kind]:.2f}" for kind in KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(units: Any, changes: Changes, found: Any, output: Path) -> None:
    """Above: predicted against true change, both orders, by kind; below: correlations of all criteria."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for axes, kind in zip(top.subplots(1, 3), ("head", "ffn", "stem")):
        predicted = []
        mine = [(u, c) for u, c in zip(changes.units, changes.scored) if u[0] == kind]
        for (_, layer, unit), _ in mine:
            predicted.append(units.of(find_kind(kind), layer)[unit])
        axes.scatter(predicted, [c for _, c in mine], s=6, c=[u[1] for u, _ in mine], cmap="viridis")
        axes.set_title(f"{KINDS[kind]}: rank correlation {found[BOTH][kind]:.2f}", fontsize=9)
        axes.set(xlabel="predicted loss change", ylabel="true loss change")
        axes.tick_params(labelsize=7)
    axes, names, width = bottom.subplots(), [name for name in found if name[0] == "`"], 0.8 / len(KINDS)
    for number, (kind, title) in enumerate(KINDS.items()):
        axes.bar(np.arange(len(names)) + number * width, [found[n][kind] for n in names], width, label=title)
    axes.set_xticks(
        np.arange(len(names)) + 0.4 - width / 2,
        [n.replace("`", "") for n in names],
        rotation=25,
        ha="right",
        fontsize=8,
    )
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_ylabel("Spearman, scored batch")
    axes.legend(fontsize=7, ncols=len(KINDS))
    figure.savefig(output / "criteria_correlation.png", dpi=80)


# Pruning --------------------------------------------------------------------------------------------------------------


def pruned_losses(config: Any, names: Sequence[str], output: Path) -> tuple[list[str], str]:
    """(lines of the table, the folder with the least loss); checkpoints in OUT/once_<name>."""
    from megatron_prune.config import SecondOrder
    from megatron_prune.launch.assembly.one_shot_run import check_pruning, one_shot_config, opened, prune_and_save

    lines = [
        "| criterion | scored once | again every 4 groups | heads / FFN / hidden, both |",
        "| --- | --- | --- | --- |",
    ]
    best: dict[str, tuple[float, str]] = {}
    jobs: dict[str, dict[str, Any]] = {f"`{name}`": {"metric": name} for name in names}
    jobs[f"`taylor_mix`{PER_TOKEN}"] = {"metric": "taylor_mix", "fisher_unit": "token"}
    jobs[BOTH + PER_TOKEN] = {"metric": BOTH, "fisher_unit": "token"}
    for name in ("taylor_mix", "obc"):
        jobs[f"`{name}`, second-order update"] = {"metric": name, "second_order": SecondOrder(enabled=True)}
    for title, changes in tqdm(jobs.items(), desc="pruning to half", disable=not sys.stderr.isatty()):
        results = []
        save = "once_" + "_".join(title.replace("`", "").replace(",", "").split())
        for folder, every in ((save, None), (f"{save}_every_4", 4)):
            if not (output / folder / "summary.json").exists():
                changed = dataclasses.replace(
                    config,
                    pruning=dataclasses.replace(config.pruning, **changes),
                    checkpoint=dataclasses.replace(config.checkpoint, save=str(output / folder)),
                )
                changed = check_pruning(one_shot_config(changed, None), 1)
                with opened(changed) as run:
                    prune_and_save(changed, run, lambda _: None, every)
            results.append((json.loads((output / folder / "summary.json").read_text())["stages"]["pruned"], folder))
        losses = [stage["validation_loss"] for stage, _ in results]
        best[title] = min(zip(losses, (folder for _, folder in results)))
        widths = " and ".join(
            " / ".join(str(stage["widths"][kind]) for kind in ("head", "ffn", "stem")) for stage, _ in results
        )
        lines.append(f"| {title} | {losses[0]:.3f} | {losses[1]:.3f} | {widths} |")
    return lines, min(found for title, found in best.items() if title != "`random`")[1]


def trained_losses(arguments: CorrelationOptions, base: Sequence[str], target: int, best: str) -> list[str]:
    """The same tokens, three ways; lines of the table."""
    from megatron_prune.pretrain import main as pretrain

    output = Path(arguments.output_dir)
    lines = ["| run | on reaching the target | final |", "| --- | --- | --- |"]
    common = [
        *base, "--micro-batch-size", "4", "--global-batch-size", str(BATCH), "--lr", "6e-3", "--min-lr", "0",
        "--lr-warmup-iters", "20", "--eval-interval", "100000", "--eval-iters", "16", "--log-interval", "100",
    ]  # fmt: skip
    start = ["--hf-model", arguments.hf_model]
    runs = {"pruned inside the training, `taylor_mix`": [*start, "--prune-target-params", str(target)]}
    for name in dict.fromkeys(("once_taylor_mix", best)):
        runs[f"one-shot `{name.removeprefix('once_')}`, then trained"] = ["--load", str(output / name)]
    for title, flags in runs.items():
        save, steps = output / "run_inside", STEPS
        if flags[0] == "--load":
            save = output / f"run_after_{Path(flags[1]).name}"
        if "--prune-target-params" in flags:
            steps = prune_steps(common, flags, output / "probe")
            flags = [*flags, "--continue-tokens", str((STEPS - steps) * BATCH * SEQUENCE), "--continue-lr", "6e-3"]
            flags += ["--continue-lr-warmup-iters", "10", "--lr-decay-style", "constant"]
        if not (save / "summary.json").exists():
            assert pretrain([*common, *flags, "--train-iters", str(STEPS), "--save", str(save)]) == 0
        stages = json.loads((save / "summary.json").read_text())["stages"]
        lines.append(
            f"| {title} | {stages['pruned']['validation_loss']:.3f} | {stages['final']['validation_loss']:.3f} |"
        )
    return lines


def prune_steps(common: Sequence[str], flags: Sequence[str], save: Path) -> int:
    """Iterations that pruning inside the training takes until the target, by a run that stops there."""
    from megatron_prune.pretrain import main as pretrain

    probe = ["--eval-interval", "0", "--lr-decay-style", "constant", "--train-iters", str(STEPS), "--save", str(save)]
    if not (save / "summary.json").exists():
        assert pretrain([*common, *flags, *probe]) == 0
    return int(json.loads((save / "summary.json").read_text())["iteration"])


# The whole ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; returns the exit status."""
    about = "How well criteria predict what removing a unit does to the loss."
    return run_command("criteria_correlation.py", CorrelationOptions, run, argv, about=about)


def run(arguments: CorrelationOptions) -> int:
    """Raises UserError."""
    from megatron_prune.config import parse_command
    from megatron_prune.data.preprocess import Options, preprocess
    from megatron_prune.huggingface.config import read_shape
    from megatron_prune.launch.assembly.one_shot_run import one_shot_config
    from megatron_prune.model.architecture import Architecture
    from megatron_prune.saliency.criteria import known_criteria

    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "text.idx").exists():
        preprocess([arguments.text], str(output / "text"), Options(arguments.hf_model, prepend_bos=True))
    base = ["--data-path", str(output / "text"), "--split", "90,10,0", "--seq-length", str(SEQUENCE)]
    target = int(Architecture.full(read_shape(arguments.hf_model)).parameters * TARGET_SHARE)
    flags = [*base, "--hf-model", arguments.hf_model, "--micro-batch-size", "1"]
    config = parse_command([*flags, "--global-batch-size", str(CALIBRATION), "--eval-iters", "2"]).config
    measured = dataclasses.replace(config.training, eval_interval=1)
    names = known_criteria()
    register_signed_predictions()
    signed = one_shot_config(dataclasses.replace(config, training=measured), None)
    lines = ["# Correlation", "", *correlate(signed, names, output)]
    goal = dataclasses.replace(config, pruning=dataclasses.replace(config.pruning, target_params=target))
    table, best = pruned_losses(goal, names, output)
    lines += ["", f"# Pruned to {target:,} parameters without training", "", *table]
    if not arguments.skip_training:
        tokens = STEPS * BATCH * SEQUENCE
        lines += ["", f"# {tokens:,} tokens of training", "", *trained_losses(arguments, base, target, best)]
    (output / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
