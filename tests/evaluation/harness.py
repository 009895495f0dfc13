"""lm-evaluation-harness by itself: its own `hf` model on local files, by YAML that does not come from evaluate.py.

DEFINITIONS   our task -> the harness's definition and the split it scores
local         a definition that reads a local file
run_harness   results of the harness
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEFINITIONS = {
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}


def local(name: str, template: str, split: str, file: Path, cache: Path) -> dict[str, Any]:
    """The harness's definition `template` with the documents of `file` as its `split`."""
    from lm_eval import tasks

    return {
        "include": str(Path(tasks.__file__).parent / template),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(cache)},
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
        "fewshot_split": None,
    }


def run_harness(
    folder: Path, definitions: list[dict[str, Any]], place: Path, batch_size: int, limit: int | None = None
) -> dict[str, Any]:
    """task -> metrics of the model in `folder`, in fp32; `place` is a folder to be made."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    place.mkdir()
    for number, definition in enumerate(definitions):
        (place / f"{number}.yaml").write_text(yaml.safe_dump(definition))
    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=[str(place / f"{number}.yaml") for number in range(len(definitions))],
        task_manager=TaskManager(include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        limit=limit,
        log_samples=False,
    )
    return found["results"]
