"""A run's last numbers as a file for Prometheus: node-exporter's textfile collector reads `*.prom` of a folder.

    exposition      numbers by name -> text in Prometheus' format, all of them gauges
    write_metrics   the same into a file, which is replaced in one piece

Every name begins with `megatron_prune_`, every line says which run it is of; `seconds/save` becomes
`megatron_prune_seconds{run="...",part="save"}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_prune.runtime.folders import replace_file

FILE_NAME = "metrics.prom"


def exposition(values: Mapping[str, float], run: str) -> str:
    """The numbers in `values`, a metric after the other."""
    metrics: dict[str, list[str]] = {}
    for name, value in values.items():
        head, _, part = name.partition("/")
        metric = "megatron_prune_" + re.sub(r"[^a-z0-9]+", "_", head.lower()).strip("_")
        labels = {"run": run, **({"part": part} if part else {})}
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        metrics.setdefault(metric, [f"# TYPE {metric} gauge"]).append(f"{metric}{{{told}}} {float(value)!r}")
    return "".join(f"{line}\n" for lines in metrics.values() for line in lines).replace("} nan", "} NaN")


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def write_metrics(values: Mapping[str, float], run: str, path: Path) -> None:
    """Replace `path`; a reader finds the old numbers or the new ones. Raises OSError."""
    replace_file(path, exposition(values, run).encode(), lasting=False)
