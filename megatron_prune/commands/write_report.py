"""A page about a run, or about several side by side, that opens in any browser without network.

    megatron-prune report runs/a [runs/b ...] --output report.html

It shows losses, sizes and learning rates over tokens, the model's shape at any moment of the run (a slider), what left
by which saliencies and how close that was, where the time went, what was measured, configured and saved. A run that
goes on can be looked at: the same command again shows how far it is. Needs plotly (`megatron_prune[report]`).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_prune.commands.running import check_file, run_command, say
from megatron_prune.config.options import option


@dataclass(frozen=True)
class PageOptions:
    """The command's options."""

    runs: tuple[str, ...] = option((), "folders that runs saved to", metavar="DIR", required=True)
    output: str = option("report.html", "the page", metavar="FILE")


def write(options: PageOptions) -> int:
    """Write the page and say so. Raises UserError."""
    from megatron_prune.report.html_page import write_page

    check_file("--output", options.output)
    path = Path(options.output)
    write_page([Path(run) for run in options.runs], path)
    say(f"{path}: {len(options.runs)} run{'s' if len(options.runs) > 1 else ''}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


main = partial(run_command, "report", PageOptions, write, first="--runs")
