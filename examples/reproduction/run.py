"""The paper's claims, judged in small: runs out of a plan, a JSON file for each, and tables with verdicts out of those.

    export MEGATRON_PRUNE_DATA=DIR          # stories260K/ and text/tinystories_944k.txt (for smollm2.yaml see there)
    python examples/reproduction/run.py --subset quick                          # under 20 minutes on two cores
    python examples/reproduction/run.py --subset all                            # everything: days on two cores
    python examples/reproduction/run.py --subset all --slurm "--ntasks 1 --time 2:00:00"      # a job array
    python examples/reproduction/run.py --collect                               # the tables alone

A run whose JSON is in the results' folder is not made again; the same command goes on. Runs are processes of their own,
`--jobs` at a time; their checkpoints go when the result is there. What is written: RESULTS/NAME.json, results.md,
loss_vs_tokens.png, loss_vs_parameters.png.

    plan          plan.yaml -> runs (method x steps x seed x learning rate)
    carry_out     one run: cut, train, read its summary
    judge         results -> claims with differences, standard errors and verdicts
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError

HERE = Path(__file__).resolve().parent
VALIDATION = 0.1  # share of the text's characters
SURE = 2.0  # standard errors from which a difference counts
EARLY = 0.25  # share of the removed groups whose choice is compared between seeds
NEEDED = {"{architecture}": "defaults", "{own_source}": "source_scratch"}  # what is left by a run of which method
HOLDS, FAILS, OPEN, NOT_RUN = "holds", "does not hold at this scale", "not decided within noise", "not run"


@dataclass(frozen=True)
class Planned:
    """One run. `cut` and `train` are flags; `needs` is the name of the run that must be there first; `iterations` are
    its own, where `steps` are those it is compared by."""

    name: str
    method: str
    steps: int
    seed: int
    rate: float
    cut: str | None
    train: str
    needs: str | None
    iterations: int


@dataclass(frozen=True)
class Places:
    """Folders: real inputs, runs, results; and the plan's content."""

    data: str
    runs: Path
    results: Path
    content: Mapping[str, Any]

    def words(self, flags: str, run: Planned) -> list[str]:
        """Flags as words, with what stands in braces filled in."""
        for name in ("source", "target"):
            flags = flags.replace(f"{{{name}}}", self.content[name])
        first = self.runs / (run.needs or run.name)
        named = {"data": self.data, "runs": str(self.runs), "own_source": str(first)}
        named["architecture"] = str(first / "architecture.json")
        return [word.format(**named) for word in shlex.split(flags)]


def plan(content: Mapping[str, Any], subset: str) -> list[Planned]:
    """The runs of a subset, those that others need first. Raises UserError for an unknown subset."""
    if subset not in content["subsets"]:
        raise UserError(f"--subset {subset}: unknown; there are {', '.join(content['subsets'])}")
    sizes, methods = content["subsets"][subset], content["methods"]
    runs = []
    for steps in sizes["steps"]:
        for name, method in methods.items():
            if (subset == "quick" and not method.get("quick")) or steps < method.get("from_steps", 0):
                continue
            cut = methods[method["cut_of"]]["cut"] if "cut_of" in method else method.get("cut")
            train = method.get("train", "")
            for seed in sizes["seeds"]:
                for rate in sizes["learning_rates"]:
                    tail = f"{steps}_{seed}_{rate:g}"
                    needs = next((f"{first}_{tail}" for word, first in NEEDED.items() if word in train), None)
                    own = round(steps * method.get("times", 1))
                    runs.append(Planned(f"{name}_{tail}", name, steps, seed, rate, cut, train, needs, own))
    return sorted(runs, key=lambda run: (run.steps, run.needs is not None))


# Carrying out ---------------------------------------------------------------------------------------------------------


def prepare(places: Places) -> None:
    """Training and validation data sets out of the text: documents are its paragraphs, the last tenth is validation."""
    text = Path(places.content["text"].format(data=places.data))
    if not text.is_file():
        raise UserError(f"MEGATRON_PRUNE_DATA: {text}: no such file")
    places.runs.mkdir(parents=True, exist_ok=True)
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text.read_text(encoding="utf-8")) if part.strip()]
    border, seen = (1 - VALIDATION) * sum(map(len, paragraphs)), 0
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for paragraph in paragraphs:
        parts["train" if seen < border else "valid"].append(paragraph)
        seen += len(paragraph)
    for name, documents in parts.items():
        if (places.runs / f"{name}.idx").is_file():
            continue
        lines = places.runs / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        tokenizer = places.content["tokenizer"].format(data=places.data)
        words = ["--input", str(lines), "--output-prefix", str(places.runs / name), "--tokenizer-model", tokenizer]
        _call(["preprocess", *words, *shlex.split(places.content["documents"])], places.runs / f"{name}.log")


def commands(run: Planned, places: Places) -> list[list[str]]:
    """The words of each command of a run, after `python -m megatron_prune`."""
    content, save, cut = places.content, str(places.runs / run.name), str(places.runs / f"{run.name}_cut")
    common = [*places.words(content["common"], run), "--seed", str(run.seed)]
    rate = [
        *("--train-iters", str(run.iterations), "--lr", f"{run.rate:g}"),
        *("--lr-warmup-iters", str(max(1, run.iterations // 20))),
        *places.words(content["training"], run),
    ]
    training = ["pretrain", *common, *rate, *places.words(run.train, run), "--save", save]
    if run.cut is None:
        return [training]
    source = places.words("{source}", run)
    first = [
        "prune-once",
        *source,
        *common,
        *shlex.split(content["cutting"]),
        *places.words(run.cut, run),
        "--save",
        cut,
    ]
    return [first, [*training, "--load", cut]]


def carry_out(run: Planned, places: Places) -> str:
    """Make a run unless its result is there; how it went, in a word. What failed is in the run's log."""
    result = places.results / f"{run.name}.json"
    if result.is_file():
        return "done before"
    if run.needs and not (places.results / f"{run.needs}.json").is_file():
        return f"waits for {run.needs}"
    log, begun = places.runs / f"{run.name}.log", time.time()
    every = commands(run, places)
    for words in every:
        save = Path(words[words.index("--save") + 1])
        if (save / "summary.json").is_file() and "final" in json.loads((save / "summary.json").read_text())["stages"]:
            continue
        if words[0] == "prune-once" and save.exists():
            continue
        if not _call(words, log):
            return f"FAILED; see {log}"
    facts = read_run(places.runs / run.name)
    facts |= {"method": run.method, "steps": run.steps, "seed": run.seed, "learning_rate": run.rate}
    facts |= {"seconds": round(time.time() - begun), "commands": [_shown(words, places) for words in every]}
    staged = result.with_suffix(".partial")
    staged.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    staged.replace(result)
    release(places.runs / run.name, places.runs / f"{run.name}_cut", run.method == NEEDED["{own_source}"])
    return f"loss {facts['loss']:.4f}, {facts['seconds']} s"


def release(run: Path, cut: Path, is_source: bool) -> None:
    """Remove checkpoints that nothing will read again; the shape that was found, histories and summaries stay, and the
    last checkpoint of what others begin with."""
    found = sorted(run.glob("iter_*"))
    for last in found[-1:]:
        shutil.copy(last / "architecture.json", run)
    for folder in (*(found[:-1] if is_source else found), *cut.glob("iter_*")):
        shutil.rmtree(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run measured: tokens, parameters, widths, losses, and which groups left first."""
    summary = json.loads((folder / "summary.json").read_text())
    stages, final = summary["stages"], summary["stages"]["final"]
    facts = {
        "tokens": summary["consumed_tokens"],
        "parameters": final["parameters"],
        "widths": final["widths"],
        "loss": final["validation_loss"],
    }
    if "source" in stages:
        facts |= {f"source_{name}": stages["source"][name] for name in ("parameters", "validation_loss")}
    if stages.get("pruned", final)["tokens"] < final["tokens"]:
        facts["pruned"] = {name: stages["pruned"][name] for name in ("tokens", "parameters", "validation_loss")}
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["pruning"]
    facts |= {name: settings[name] for name in ("metric", "balance")}  # which defaults it was made with
    history = folder / "pruning_history.jsonl"
    lines = [json.loads(line) for line in history.read_text().splitlines()] if history.is_file() else []
    removals = [line for line in lines if line.get("gone")]
    facts["groups"] = "".join(line["group"][0] for line in removals)  # in the order in which they left, by initials
    facts["early"] = sorted(
        f"{kind}:{layer}:{unit}"
        for line in removals[: math.ceil(EARLY * len(removals))]
        for kind, layers in line["gone"].items()
        for layer, units in enumerate(layers)
        for unit in units
    )
    return facts


def _call(words: Sequence[str], log: Path) -> bool:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ python -m megatron_prune {shlex.join(words)}\n")
        file.flush()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megatron_prune", *words]
        return (
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode == 0
        )


def _shown(words: Iterable[str], places: Places) -> str:
    """A command for readers: no folder of this machine is in it."""
    named = {places.data: "$MEGATRON_PRUNE_DATA", str(places.runs): "build/reproduction"}
    text = shlex.join(["megatron-prune", *words])
    for folder, name in named.items():
        text = text.replace(folder, name)
    return text


# Judging --------------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*_*.json"))]


def best_rates(results: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], list[float]]:
    """(steps, method) -> losses of its seeds, at the learning rate at which their mean is least."""
    found: dict[tuple[int, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        found[result["steps"], result["method"]][result["learning_rate"]].append(result["loss"])
    most = {key: max(map(len, rates.values())) for key, rates in found.items()}
    return {
        key: min((losses for losses in rates.values() if len(losses) == most[key]), key=statistics.mean)
        for key, rates in found.items()
    }


def spread(
    content: Mapping[str, Any], losses: Mapping[tuple[int, str], Sequence[float]], steps: int, method: str
) -> float:
    """Standard deviation of one run over seeds, pooled over the methods that start alike; NaN where none has two seeds.

    Runs from random weights spread more than those from the source's.
    """

    def begins(name: str) -> bool:
        return any(word in content["methods"][name].get("train", "") for word in ("--init random", "{own_source}"))

    alike = [v for (length, name), v in losses.items() if length == steps and begins(name) == begins(method)]
    freedom = sum(len(values) - 1 for values in alike)
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in alike if len(values) > 1)
    return math.sqrt(squares / freedom) if freedom else math.nan


def verdict(difference: float, error: float) -> str:
    """What a difference (positive: as claimed) with its standard error says; NaN: it is not known."""
    if not abs(difference) >= SURE * error:
        return OPEN
    return HOLDS if difference > 0 else FAILS


def judge(
    content: Mapping[str, Any], losses: Mapping[tuple[int, str], Sequence[float]]
) -> Iterator[tuple[str, str, int, str, str]]:
    """Rows: claim, the methods compared, steps, difference with its standard error, verdict."""
    for claim, (better, *others) in content["claims"].items():
        for other in others:
            lengths = [steps for steps, method in losses if method == better and (steps, other) in losses]
            if not lengths:
                yield claim, f"{better} < {other}", 0, "", NOT_RUN
            for steps in sorted(lengths):
                a, b = losses[steps, better], losses[steps, other]
                error = math.hypot(
                    *(spread(content, losses, steps, m) / math.sqrt(len(v)) for m, v in ((better, a), (other, b)))
                )
                difference = statistics.mean(b) - statistics.mean(a)
                shown = f"{difference:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
                yield claim, f"{better} < {other}", steps, shown, verdict(difference, error)


def agreement(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the units that left early with one seed and did so with another, too; over pairs of runs."""
    early = [set(result["early"]) for result in results if result["early"]]
    pairs = [(a, b) for i, a in enumerate(early) for b in early[i + 1 :]]
    return statistics.mean(len(a & b) / max(len(a), len(b)) for a, b in pairs) if pairs else None


def markdown(content: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    """The tables: claims with verdicts, then every method."""
    losses = best_rates(results)
    lines = ["| claim | compared | steps | difference of loss | verdict |", "| --- | --- | ---: | ---: | --- |"]
    lines += [" | ".join(["", claim, f"`{what}`", str(steps or ""), shown, said, ""]).strip()
              for claim, what, steps, shown, said in judge(content, losses)]  # fmt: skip
    lengths = sorted({steps for steps, _ in losses})
    tokens = {steps: min(result["tokens"] for result in results if result["steps"] == steps) for steps in lengths}
    heads = [f"{steps} steps, {tokens[steps] / 1e6:.2f} M tokens" for steps in lengths]
    lines += ["", f"| method | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(lengths)}"]
    for method in content["methods"]:
        cells = [losses.get((steps, method)) for steps in lengths]
        shown = [" ".join(f"{loss:.3f}" for loss in cell) if cell else "not run" for cell in cells]
        lines.append(f"| `{method}` | {' | '.join(shown)} |")
    same = [result for result in results if result["method"] == "defaults"]
    for steps in lengths:
        share = agreement([result for result in same if result["steps"] == steps])
        if share is not None:
            said = f"Of the units that `defaults` removes first (a quarter), {share:.0%} are the same with another seed"
            lines += ["", f"{said} ({steps} steps)."]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Loss against tokens, of every method; and against parameters, from the source over the target to the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = best_rates(results)
    tokens = {result["steps"]: result["tokens"] for result in results}
    for name, label in (("loss_vs_tokens", "tokens"), ("loss_vs_parameters", "parameters")):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for method in dict.fromkeys(method for _, method in losses):
            if label == "tokens":
                points = [(tokens[s], statistics.mean(v)) for (s, m), v in sorted(losses.items()) if m == method]
            else:
                longest = max((result for result in results if result["method"] == method), key=lambda r: r["steps"])
                pruned, last = longest.get("pruned"), (longest["parameters"], longest["loss"])
                first = (longest.get("source_parameters"), longest.get("source_validation_loss"))
                middle = [(pruned["parameters"], pruned["validation_loss"])] if pruned else []
                points = [first, *middle, last] if pruned else [last]
            axes.plot(*zip(*points), marker="o", label=method)
        axes.set(xlabel=label, ylabel="validation loss, nats per token")
        axes.set_xscale("log" if label == "tokens" else "linear")
        axes.legend(fontsize=6, ncols=2)
        figure.savefig(folder / f"{name}.png", dpi=100, bbox_inches="tight")
        pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------------


def submit(slurm: str, arguments: ReproductionOptions, count: int, first: int) -> None:
    """A job array of the runs that need no other, one of those that do, and a last job that collects.

    Raises:
        UserError: the options are no words of a shell, or sbatch refuses them.
    """
    named = {"subset": arguments.subset, "results": arguments.results, "runs": arguments.runs, "plan": arguments.plan}
    own = [sys.executable, str(HERE / "run.py"), *(f"--{name}={value}" for name, value in named.items())]
    own += [*(["--only", *arguments.only] if arguments.only else []), "--index"]
    try:
        options = shlex.split(slurm)
    except ValueError as error:
        raise UserError(f"--slurm {slurm}: {error}") from error
    previous: list[str] = []
    for begin, end in ((0, first), (first, count), (-1, 0)):
        if begin >= end:
            continue
        array = ["--array", f"{begin}-{end - 1}"] if begin >= 0 else []
        index = '"$SLURM_ARRAY_TASK_ID"' if begin >= 0 else "-1"
        words = ["sbatch", "--parsable", *array, *previous, *options, "--wrap", f"{shlex.join(own)} {index}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--slurm {slurm}: sbatch: {done.stderr.strip().partition(chr(10))[0] or done.returncode}")
        job = done.stdout.strip().partition(";")[0]
        previous = ["--dependency", f"afterany:{job}"]
        print(f"job {job}: {f'runs {begin} to {end - 1}' if begin >= 0 else 'collects'}", flush=True)


@dataclass(frozen=True)
class ReproductionOptions:
    """Its options."""

    subset: str = option("quick", "which runs, by the plan's name", metavar="NAME")
    plan: str = option(str(HERE / "plan.yaml"), "what is run and compared", metavar="FILE")
    runs: str = option("build/reproduction", "folder for runs and logs", metavar="DIR")
    results: str = option("build/reproduction/results", "folder for results and tables", metavar="DIR")
    jobs: int = option(2, "runs at a time", at_least=1)
    only: tuple[str, ...] = option((), "these methods alone", metavar="NAME")
    slurm: str | None = option(None, "submit a job array with these options of sbatch instead", metavar="TEXT")
    index: int | None = option(None, "of a job array: this run alone; -1: collect", at_least=-1)
    collect: bool = option(False, "make the tables from the results that are there")


def work(arguments: ReproductionOptions) -> int:
    """Make what is missing, then the tables; the exit status. Raises UserError."""
    content = yaml.safe_load(Path(arguments.plan).read_text(encoding="utf-8"))
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    failed = 0
    if not arguments.collect and arguments.index != -1:
        data = os.environ.get("MEGATRON_PRUNE_DATA")
        if not data:
            raise UserError("MEGATRON_PRUNE_DATA is unset; it names the folder with stories260K/ and text/")
        places = Places(str(Path(data).resolve()), Path(arguments.runs), results, content)
        runs = [run for run in plan(content, arguments.subset) if not arguments.only or run.method in arguments.only]
        prepare(places)
        if arguments.slurm is not None:
            alone = [run for run in runs if run.needs is None]
            submit(arguments.slurm, arguments, len(runs), len(alone))
            return 0
        if arguments.index is not None:
            runs = runs[arguments.index : arguments.index + 1]
        failed = run_all(runs, places, arguments.jobs)
        if arguments.index is not None:
            return 1 if failed else 0
    found = read_results(results)
    if not found:
        raise UserError(f"--results {results}: holds no results yet")
    text = markdown(content, found)
    (results / "results.md").write_text(text, encoding="utf-8")
    if find_spec("matplotlib") is not None:
        draw(found, results)
    print(text)
    return 1 if failed else 0


def run_all(runs: Sequence[Planned], places: Places, jobs: int) -> int:
    """Make the runs, several at a time, those that need others after those; how many failed."""
    failed = 0
    for needing in (False, True):
        group = [run for run in runs if (run.needs is not None) == needing]
        with ThreadPoolExecutor(jobs) as pool:
            for run, said in zip(group, pool.map(lambda run: carry_out(run, places), group)):
                print(f"{run.name}: {said}", flush=True)
                failed += said.startswith("FAILED")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("run.py", ReproductionOptions, work, argv, about="The paper's claims, judged in small.")


if __name__ == "__main__":
    sys.exit(main())
