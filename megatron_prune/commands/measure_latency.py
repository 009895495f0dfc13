"""Time models of a source's family with transformers, for `pruning.target: {latency: ..., latency_table: FILE}`.

    megatron-prune measure-latency --hf-model SmolLM-360M --save table.json
    megatron-prune measure-latency --hf-model exported

The first measures the source's shape and smaller ones (fewer heads, narrower FFN, smaller hidden size, fewer layers)
with random weights; run it on the machine and with the threads that the pruned model is for. The second says how long
one model takes, measured alike. All are measured in turn, again and again, and the quickest time of each counts: what
else runs on the machine only ever adds to it.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, check_file, run_command, say
from megatron_prune.config.options import option
from megatron_prune.errors import UserError, first_line
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import LlamaShape
from megatron_prune.runtime.folders import replace_file

SHARES = (0.75, 0.5)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LatencyOptions:
    """The command's options."""

    hf_model: str = option(None, "folder with config.json", metavar="DIR", required=True)
    save: str | None = option(None, "the table; without it only the model itself is measured", metavar="FILE")
    phase: str = option(
        "decode", "decode: milliseconds per token with a cache; prefill: of the whole prompt", metavar="P"
    )
    prompt_length: int = option(128, "tokens of the prompt", at_least=1)
    decoded_tokens: int = option(32, "tokens after it", at_least=2)
    batch_size: int = option(1, "sequences at once", at_least=1)
    repeats: int = option(3, "times that every model is measured, in turn; the quickest counts", at_least=1)
    threads: int | None = option(None, "CPU threads; null: as torch has them", at_least=1)
    dtype: str = option("float32", ", ".join(DTYPES), metavar="T")
    device: str = option("cpu", "of torch, such as cpu or cuda")


def measure(arguments: LatencyOptions) -> int:
    """Measure, and write the table; the exit status. Raises UserError."""
    for name, value, known in (("phase", arguments.phase, ("decode", "prefill")), ("dtype", arguments.dtype, DTYPES)):
        if value not in known:
            raise UserError(f"--{name} {value}: unknown; use {', '.join(known)}")
    if find_spec("transformers") is None:
        raise UserError("measure-latency needs transformers: install megatron-prune[hf]")
    from megatron_prune.data.hub_files import read_json
    from megatron_prune.huggingface.config import shape_from_config
    from megatron_prune.pruning.latency import LatencyTable, Point, around

    shape = shape_from_config(read_json(Path(arguments.hf_model) / "config.json"))
    what = f"{arguments.phase}, {arguments.batch_size} x {arguments.prompt_length} tokens, {arguments.dtype}"
    if arguments.save is None:
        say(f"{arguments.hf_model}: {timed(arguments, [shape])[0]:.3f} ms ({what})")
        return 0
    check_file("--save", arguments.save)
    shapes = around(shape, SHARES)
    points = [Point(*pair) for pair in zip(shapes, timed(arguments, shapes), strict=True)]
    table = LatencyTable(f"{what}, {arguments.device}, {platform.machine()}", tuple(points))
    replace_file(Path(arguments.save), (json.dumps(table.to_json(), indent=1) + "\n").encode())
    for point in points:
        s = point.shape
        say(
            f"{s.num_layers} layers, hidden {s.hidden_size}, {s.num_attention_heads} heads, {s.num_query_groups} KV "
            f"heads, FFN {s.ffn_hidden_size}: {point.milliseconds:.3f} ms"
        )
    say(f"{arguments.save}: {len(points)} models ({what}); the fit is off by {table.worst:.1%} at most")
    return 0


def timed(arguments: LatencyOptions, shapes: Sequence[LlamaShape]) -> list[float]:
    """Milliseconds of one token (decode) or of the prompt (prefill), of a model of each shape with random weights."""
    turns = [shape for _ in range(arguments.repeats) for shape in shapes]
    found = [_once(arguments, shape) for shape in tqdm(turns, unit="model", disable=not sys.stderr.isatty())]
    return [1000 * min(found[number :: len(shapes)]) for number in range(len(shapes))]


def _once(arguments: LatencyOptions, shape: LlamaShape) -> float:
    """Seconds, once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_prune.huggingface.config import config_json

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    config = config_json(Architecture.full(shape), arguments.dtype, shape.num_query_groups)  # as exports have it
    left_out = ("architectures", "model_type", "torch_dtype", "transformers_version")
    known = {name: value for name, value in config.items() if name not in left_out}
    dtype = getattr(torch, arguments.dtype)
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device}: {first_line(error)}") from error
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **known))
    model = model.to(device=device, dtype=dtype).eval()
    tokens = torch.randint(shape.vocab_size, (arguments.batch_size, arguments.prompt_length), device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.inference_mode():
        for _ in range(2):  # the first round warms up
            prefill, decode = _one_round(model, tokens, arguments.decoded_tokens, wait)
    return decode if arguments.phase == "decode" else prefill


def _one_round(model: Any, tokens: Any, decoded: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the prompt, and the median of those of each token after it."""
    wait()
    start = time.perf_counter()
    output = model(tokens, use_cache=True)
    wait()
    prefill, steps = time.perf_counter() - start, []
    for _ in range(decoded):
        token = output.logits[:, -1:].argmax(dim=-1)
        wait()
        start = time.perf_counter()
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        wait()
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps)


main = partial(run_command, "measure-latency", LatencyOptions, measure, interrupted=NOTHING_WRITTEN)
