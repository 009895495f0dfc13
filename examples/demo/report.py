"""The demo's last step: reload both exported models with stock transformers, let the small one write, print the table.

    python examples/demo/report.py --folder build/demo --seconds 360

Reads what the two runs measured (`source/summary.json`, `pruned/summary.json`), loads `source_hf` and `pruned_hf`. What
is printed is also written to `results.md` in the folder.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option

STAGES = {"source": "source", "pruned": "right after pruning", "final": "final"}
HEADINGS = ("model", "parameters", "heads (KV)", "FFN", "hidden", "tokens seen", "validation loss", "tokens/s")
PROMPT = "    def __init__(self"
FIGURES = ("pruning_saliencies.png", "pruning_widths.png")


def table(source: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Headings and one row per stage, as text.

    Args:
        source: summary.json of the source's run. pruned: summary.json of the pruning run.

    Raises:
        KeyError: a stage was not measured.
    """
    rows: list[tuple[str, ...]] = [HEADINGS]
    for stage, label in STAGES.items():
        facts = pruned["stages"][stage]
        heads, kv_heads, ffn, hidden = (_most(facts["widths"][kind]) for kind in ("head", "kv_head", "ffn", "stem"))
        rows.append(
            (
                label,
                f"{facts['parameters']:,}",
                f"{heads} ({kv_heads})",
                str(ffn),
                str(hidden),
                f"{source['consumed_tokens'] + facts['tokens']:,}",
                f"{facts['validation_loss']:.3f}",
                f"{facts['evaluation_tokens_per_second']:,.0f}",
            )
        )
    return rows


def _most(width: int | list[int]) -> int:
    """Of a width that is a list where layers differ."""
    return max(width) if isinstance(width, list) else width


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first holds the headings) as a Markdown table whose columns line up; all but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def machine() -> str:
    """Processor, usable cores, operating system and Python."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{name}, {cores} core{'s' if cores > 1 else ''}, {platform.system()}, Python {platform.python_version()}"


def load(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as stock transformers loads them from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def write(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """The prompt and how the model goes on, white space closed up: the likeliest token each time, no three repeated."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, no_repeat_ngram_size=3)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


def speeds(models: Sequence[Any], batch: int = 8, length: int = 128, rounds: int = 12) -> list[float]:
    """Tokens/s of forward passes, the fastest of several, models in turn: other load on the machine counts little."""
    import torch

    ids = torch.randint(3, models[0].config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    best = [float("inf")] * len(models)
    with torch.inference_mode():
        for _ in range(rounds):
            for i, model in enumerate(models):
                start = time.perf_counter()
                model(input_ids=ids)
                best[i] = min(best[i], time.perf_counter() - start)
    return [batch * length / seconds for seconds in best]


def report(folder: Path, seconds: int) -> str:
    """The whole text."""
    source, pruned = (json.loads((folder / run / "summary.json").read_text()) for run in ("source", "pruned"))
    (large, _), (small, tokenizer) = load(folder / "source_hf"), load(folder / "pruned_hf")
    before, after = speeds([large, small])
    learned = [source["stages"]["source"]["validation_loss"], pruned["stages"]["source"]["validation_loss"]]
    figures = [str(folder / "pruned" / name) for name in FIGURES if (folder / "pruned" / name).exists()]
    lines = [
        markdown(table(source, pruned)),
        "",
        "Validation loss in nats per token; tokens/s in evaluation by two tensor-parallel processes. All of it was",
        f"measured in this run. The source had learned from {learned[0]:.3f} (random weights) to {learned[1]:.3f};",
        f"{pruned['groups_removed']} groups then left it in {pruned['stages']['pruned']['iteration']} iterations.",
        "",
        f"- machine: {machine()}; {seconds // 60} min {seconds % 60:02d} s up to here",
        f"- figures (saliencies and widths over tokens): {', '.join(figures) or 'none, matplotlib is not installed'}",
        f"- exported model: {folder / 'pruned_hf'} ({type(small).__name__}); its source: {folder / 'source_hf'}",
        f"- stock transformers, one thread: source {before:,.0f} tokens/s, exported model {after:,.0f} tokens/s",
        f"- the exported model goes on from {PROMPT!r}: `{write(small, tokenizer, PROMPT)}`",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class ReportOptions:
    """Its options."""

    folder: str = option(None, "where the demo writes everything", metavar="DIR", required=True)
    seconds: int = option(0, "how long the demo has taken")


def show(arguments: ReportOptions) -> int:
    """Print the report and write it; the exit status."""
    folder = Path(arguments.folder)
    try:
        text = report(folder, arguments.seconds)
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    (folder / "results.md").write_text(f"# The demo's results\n\n{text}", encoding="utf-8")
    print(f"\n{text}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("report.py", ReportOptions, show, argv, about="What the demo came to.")


if __name__ == "__main__":
    sys.exit(main())
