"""The last step of examples/smollm2.sh: speed and size of source and pruned model, a table of all that was measured.

    python examples/smollm2/report.py --folder build/smollm2

Reads what the run (`pruned/summary.json`) and the evaluation (`evaluation/evaluation.json`) measured, loads `source`
and `pruned_hf` with stock transformers, and their GGUF files with llama.cpp where llama-cpp-python is installed.
Writes `results.md` and `results.json` into the folder.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_prune.commands.running import run_command
from megatron_prune.config.options import option
from megatron_prune.errors import UserError

MODELS = {"source": "source", "pruned_hf": "pruned"}  # folder -> what the table calls it
LENGTH = 256  # tokens of a forward pass
NEW = 32  # tokens written
ROUNDS = 4
BYTES = 2  # of a number in the KV cache, bf16


def is_finished(folder: Path) -> bool:
    """Whether the run has come to its end: the final model is measured then."""
    file = folder / "pruned" / "summary.json"
    return file.is_file() and "final" in json.loads(file.read_text())["stages"]


def measures(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each model: name -> {what: value}; None where something was not measured."""
    stages = json.loads((folder / "pruned" / "summary.json").read_text())["stages"]
    evaluated = json.loads((folder / "evaluation" / "evaluation.json").read_text())["models"]
    rows = {}
    for (name, label), stage, entry in zip(MODELS.items(), ("source", "final"), evaluated):
        config = json.loads((folder / name / "config.json").read_text())
        facts = {
            "parameters": stages[stage]["parameters"],
            "heads (KV)": f"{config['num_attention_heads']} ({config['num_key_value_heads']})",
            "FFN": config["intermediate_size"],
            "hidden": config["hidden_size"],
            "tokens trained here": stages[stage]["tokens"],
            "validation loss": stages[stage]["validation_loss"],
            "perplexity": entry["perplexity"][0]["perplexity"] if entry["perplexity"] else None,
        }
        for score in entry["tasks"]:
            facts[f"{score['task']} ({score['metric']})"] = (score["value"], score["stderr"])
        facts["weights, MB"] = (folder / name / "model.safetensors").stat().st_size / 1e6
        facts["KV cache, bytes per token"] = kv_bytes(config)
        rows[label] = facts
    return rows


def kv_bytes(config: Mapping[str, Any]) -> int:
    """Bytes that a token takes in the KV cache, in bf16."""
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * BYTES


def in_a_process(measure: Callable[[Path], dict[str, float]], file: Path) -> dict[str, float]:
    """`measure(file)` in a fresh process, so that its peak of memory is this model's alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, file).result()


def peak_megabytes() -> float:
    """What this process held in memory at most: libraries, weights, cache and activations."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def transformers_speed(folder: Path) -> dict[str, float]:
    """Tokens/s of one thread in stock transformers, fp32: reading a text, and writing after it with a cache; memory."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    ids = torch.randint(100, model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def write() -> None:
        model.generate(ids[:, :8], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    with torch.inference_mode():
        found = {
            "transformers, tokens/s read": LENGTH / fastest(lambda: model(ids)),
            "transformers, tokens/s written": NEW / fastest(write),
        }
    return found | {"transformers, MB at the peak": peak_megabytes()}


def llama_speed(file: Path) -> dict[str, float]:
    """The same in llama.cpp, one thread, the file's own dtype; empty where llama-cpp-python is not installed."""
    if find_spec("llama_cpp") is None:
        return {}
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=2 * LENGTH, n_threads=1, n_threads_batch=1, verbose=False)
    ids = [(7 * i) % 40000 + 100 for i in range(LENGTH)]

    def read() -> None:
        model.reset()
        model.eval(ids)

    def write() -> None:
        for _ in range(NEW):
            model.eval([100])

    found = {"llama.cpp, tokens/s read": LENGTH / fastest(read), "llama.cpp, tokens/s written": NEW / fastest(write, 2)}
    model.close()
    return found | {"llama.cpp, MB at the peak": peak_megabytes()}


def fastest(work: Any, rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of several rounds: other load on the machine counts little."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def shown(value: Any) -> str:
    """A value as the table has it; accuracies with their standard error."""
    if value is None:
        return "not measured"
    if isinstance(value, list | tuple):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each measure, a column for each model."""
    names = list(dict.fromkeys(name for facts in rows.values() for name in facts))
    lines: list[Sequence[str]] = [["", *rows], ["---", *["---:"] * len(rows)]]
    lines += [[name, *(shown(facts.get(name)) for facts in rows.values())] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class SmolReportOptions:
    """Its options."""

    folder: str = option(None, "where examples/smollm2.sh writes everything", metavar="DIR", required=True)
    corpus: str = option("python", "what was trained on, for the table's caption", metavar="TEXT")
    is_finished: bool = option(False, "only say by the exit status whether the run has come to its end")


def show(arguments: SmolReportOptions) -> int:
    """Measure, print the table and write it; the exit status. Raises UserError."""
    folder = Path(arguments.folder)
    if arguments.is_finished:
        return 0 if is_finished(folder) else 1
    try:
        rows = measures(folder)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"--folder {folder}: lacks what is to be shown: {type(error).__name__}: {error}") from error
    for name, label in MODELS.items():
        rows[label] |= in_a_process(transformers_speed, folder / name)
        rows[label] |= in_a_process(llama_speed, folder / f"{name}.gguf")
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    caption = (
        f"Corpus: {arguments.corpus}. Losses in nats per token on held-out text of it; accuracies with standard "
        "errors; speeds with one thread, transformers in fp32, llama.cpp in bf16."
    )
    text = f"{markdown(rows)}\n\n{caption}\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status."""
    return run_command("report.py", SmolReportOptions, show, argv, about="What pruning SmolLM2 came to.")


if __name__ == "__main__":
    sys.exit(main())
