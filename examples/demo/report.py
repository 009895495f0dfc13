"""The demo's last step: reload the exported model with stock transformers, let it write a line, and print the table.

    python examples/demo/report.py --folder build/demo --seconds 360

Reads what the two runs measured (`source/summary.json`, `pruned/summary.json`) and loads `pruned_hf`. What is printed is
also written to `results.md` in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STAGES = {"source": "source", "pruned": "right after pruning", "final": "final"}
HEADINGS = ("model", "parameters", "heads (KV)", "FFN", "hidden", "tokens seen", "validation loss", "tokens/s")
PROMPT = "Return the number of"
FIGURES = ("pruning_saliencies.png", "pruning_widths.png")


def table(source: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Headings and one row per stage, as text.

    Args:
        source: summary.json of the source's run. pruned: summary.json of the pruning run.

    Raises:
        KeyError: a stage was not measured.
    """
    rows = [HEADINGS]
    for stage, label in STAGES.items():
        facts = pruned["stages"][stage]
        rows.append(
            (
                label,
                f"{facts['parameters']:,}",
                f"{facts['num_attention_heads']} ({facts['num_query_groups']})",
                str(facts["ffn_hidden_size"]),
                str(facts["hidden_size"]),
                f"{source['consumed_tokens'] + facts['tokens']:,}",
                f"{facts['validation_loss']:.3f}",
                f"{facts['evaluation_tokens_per_second']:,.0f}",
            )
        )
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows (the first holds the headings) as a Markdown table whose columns line up; all but the first to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = [("-" if i == 0 else "-") * (width - (i > 0)) + (":" if i > 0 else "") for i, width in enumerate(widths)]
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


def write_line(folder: Path, prompt: str) -> str:
    """The prompt and how the model in `folder` goes on, on one line; stock transformers, the likeliest token each time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    ids.pop("token_type_ids", None)
    written = model.generate(**ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(written[0], skip_special_tokens=True).split())


def report(folder: Path, seconds: int) -> str:
    """The whole text."""
    source, pruned = (json.loads((folder / run / "summary.json").read_text()) for run in ("source", "pruned"))
    stages = pruned["stages"]
    start = source["stages"]["source"]["validation_loss"]
    figures = ", ".join(str(folder / "pruned" / name) for name in FIGURES if (folder / "pruned" / name).exists())
    line = write_line(folder / "pruned_hf", PROMPT)
    return f"""{markdown(table(source, pruned))}

Validation loss in nats per token; tokens/s in evaluation, two processes; all of it measured in this run.
The source learned from {start:.3f} (random weights) to {stages["source"]["validation_loss"]:.3f}; {pruned["groups_removed"]} \
groups were removed in {stages["pruned"]["iteration"]} iterations.

- machine: {machine()}; the demo took {seconds // 60} min {seconds % 60} s so far
- figures (saliencies and widths over tokens): {figures or "none, matplotlib is not installed"}
- exported model: {folder / "pruned_hf"} (the source: {folder / "source_hf"})
- it writes: {line}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the demo writes everything")
    parser.add_argument("--seconds", type=int, default=0, metavar="N", help="how long the demo has taken")
    arguments = parser.parse_args(argv)
    try:
        text = report(arguments.folder, arguments.seconds)
    except (OSError, KeyError, ValueError) as error:
        print(f"report: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    (arguments.folder / "results.md").write_text(f"# The demo's results\n\n{text}", encoding="utf-8")
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
