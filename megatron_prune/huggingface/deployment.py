"""Which runtimes take an exported model of this shape, and why not: `convert-to-hf --deploy-check`.

transformers and llama.cpp were run on exports, vLLM on some (docs/deploy.md); what is said of tensor parallelism and of
SGLang is what their sources require of a model's sizes, and was not run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prune.huggingface.cluster import MODEL_TYPE
from megatron_prune.huggingface.config import OLDEST_TRANSFORMERS, shape_from_config
from megatron_prune.huggingface.gguf_file import why_not

TP_SIZES = (1, 2, 4, 8)
RUN_IN_VLLM = ("llama", "mistral", "qwen3")  # with one process (docs/deploy.md)
Q8_BLOCK, K_BLOCK = 32, 256  # elements of a row that llama.cpp quantizes together


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of a model: `takes` is yes, no or partly."""

    runtime: str
    takes: str
    why: str


def verdicts(config: Mapping[str, Any]) -> Iterator[Verdict]:
    """A verdict per runtime on the model that the `config.json` of an export describes."""
    kind = config["model_type"]
    if kind == MODEL_TYPE:
        code = "its code comes with the folder: trust_remote_code=True"
        yield Verdict("transformers", "yes", code)
        stock = "KV heads serve different numbers of query heads; export with --kv-policy expand"
        yield from (Verdict(name, "no", stock) for name in ("llama.cpp", "vLLM", "SGLang"))
        return
    if config["torch_dtype"] == "float32":
        yield Verdict("all of them", "yes", "stored in float32, as the source is; --dtype bfloat16 is half of it")
    yield Verdict("transformers", "yes", f"{config['architectures'][0]}, from {OLDEST_TRANSFORMERS[kind]} on")
    yield from _llama_cpp(config)
    for name in ("vLLM", "SGLang"):
        yield _server(name, config)


def _llama_cpp(config: Mapping[str, Any]) -> Iterator[Verdict]:
    obstacle = why_not(shape_from_config(config))
    if obstacle:
        yield Verdict("llama.cpp", "no", obstacle)
        return
    free = config["model_type"] != "olmo2"
    any_width = "any width: the head dimension is stated"
    yield Verdict("llama.cpp f16", "yes", any_width if free else "its heads' channels are as many as the hidden ones")
    for name, block in (("q8_0", Q8_BLOCK), ("q4_k", K_BLOCK)):
        uneven = [f"{what} {size}" for what, size in _rows(config).items() if size % block]
        takes = "yes" if not uneven else "no" if len(uneven) == len(_rows(config)) else "partly"
        rounded = f"no multiple of {block}: {', '.join(uneven)}; such matrices stay in a larger type (round_to={block})"
        yield Verdict(f"llama.cpp {name}", takes, rounded if uneven else f"all rows are multiples of {block}")


def _rows(config: Mapping[str, Any]) -> dict[str, int]:
    """Lengths of the rows of matrices, by what they are made of."""
    heads = config["num_attention_heads"] * config["head_dim"]
    return {"hidden size": config["hidden_size"], "FFN": config["intermediate_size"], "heads x dimension": heads}


def _server(name: str, config: Mapping[str, Any]) -> Verdict:
    if config["model_type"] == "smollm3":
        its_own = {"vLLM": ("yes", "by its sources, not run: through its transformers backend")}
        return Verdict(name, *its_own.get(name, ("unknown", "not looked at for smollm3; see its list of models")))
    if name == "SGLang" and config.get("mlp_bias"):
        return Verdict(name, "no", "its Llama has no biases in the FFN")
    heads, kv, ffn = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
    fits = [
        size
        for size in TP_SIZES
        if heads % size == 0 and ffn % size == 0 and (kv % size == 0 if kv >= size else size % kv == 0)
    ]
    sizes = ", ".join(map(str, fits))
    why = f"tensor parallel {sizes}" + ("" if 2 in fits else f" alone: {heads} heads ({kv} KV), FFN {ffn}")
    implied = config["hidden_size"] / heads
    if config["model_type"] == "olmo2" and config["head_dim"] != implied:
        return Verdict(name, "no", f"takes hidden / heads ({implied:g}) for the head dimension ({config['head_dim']})")
    if config["head_dim"] != int(implied):
        why += f"; needs a release that reads head_dim ({config['head_dim']}, not hidden/heads)"
    ran = name == "vLLM" and config["model_type"] in RUN_IN_VLLM
    its = "the sources of releases with an OLMo 2 class" if config["model_type"] == "olmo2" else "its sources"
    seen = f"run on a CPU; by {its}" if ran else f"by {its}, not run"
    return Verdict(name, "yes", f"{seen}: {why}")


def table(found: Sequence[Verdict]) -> str:
    """A line per runtime."""
    rows = [("runtime", "takes it", "why"), *((one.runtime, one.takes, one.why) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)
