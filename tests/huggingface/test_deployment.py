"""`convert-to-hf --deploy-check`: what is said of a shape follows from what the runtimes ask of it."""

import pytest

from megatron_prune.huggingface.config import config_json
from megatron_prune.huggingface.deployment import table, verdicts
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.shape import LlamaShape


def told(shape, **changes):
    config = config_json(Architecture.full(shape), "bfloat16", shape.num_query_groups) | changes
    return {one.runtime: one for one in verdicts(config)}


def llama(hidden=512, ffn=1536, heads=8, kv=4, d=64, **more):
    return LlamaShape(2, hidden, ffn, heads, kv, d, 100, 64, **more)


def test_a_shape_of_round_widths_is_taken_everywhere():
    found = told(llama())
    assert {one.takes for one in found.values()} == {"yes"} and len(found) == 6
    assert found["vLLM"].why.endswith("tensor parallel 1, 2, 4, 8")
    text = table(list(found.values()))
    assert len(text.splitlines()) == 7 and "LlamaForCausalLM, from 4.45 on" in text


def test_the_source_s_float32_is_told_of():
    found = told(llama(), torch_dtype="float32")
    assert "--dtype bfloat16" in found["all of them"].why and len(found) == 7


@pytest.mark.parametrize(
    ("shape", "runtime", "takes", "why"),
    [
        (llama(hidden=547), "llama.cpp q8_0", "partly", "hidden size 547"),
        (llama(ffn=1504), "llama.cpp q4_k", "partly", "FFN 1504"),
        (llama(ffn=1504), "llama.cpp q8_0", "yes", "multiples of 32"),
        (llama(hidden=547, ffn=1101, heads=3, kv=1, d=20), "llama.cpp q4_k", "no", "heads x dimension 60"),
        (llama(heads=9, kv=3), "vLLM", "yes", "tensor parallel 1 alone: 9 heads (3 KV), FFN 1536; needs a release"),
        (llama(ffn=1538), "SGLang", "yes", "tensor parallel 1, 2"),
        (llama(kv=1, heads=8), "vLLM", "yes", "tensor parallel 1, 2, 4, 8"),
        (llama(model_type="olmo2"), "vLLM", "yes", "tensor parallel 1, 2, 4, 8"),
        (llama(model_type="olmo2"), "llama.cpp f16", "yes", "as many as the hidden ones"),
        (
            llama(model_type="olmo2", hidden=576),
            "SGLang",
            "no",
            "takes hidden / heads (72) for the head dimension (64)",
        ),
        (llama(model_type="olmo2", hidden=576), "llama.cpp", "no", "channels of an olmo2 model's heads (512)"),
        (llama(model_type="olmo2", tie_word_embeddings=True), "llama.cpp", "no", "an output layer of its own"),
        (llama(hidden=500), "transformers", "yes", "MistralForCausalLM"),
    ],
)
def test_what_does_not_fit_is_named(shape, runtime, takes, why):
    verdict = told(shape)[runtime]
    assert verdict.takes == takes and why in verdict.why, verdict


def test_what_is_no_stock_model_is_refused_by_those_who_know_stock_models():
    found = told(llama(), model_type="cluster_llama")
    assert found["transformers"].takes == "yes" and "trust_remote_code" in found["transformers"].why
    assert all("--kv-policy expand" in found[name].why for name in ("llama.cpp", "vLLM", "SGLang"))
    smollm3 = told(llama(model_type="smollm3", no_rope_layers=(1,)))
    assert "transformers backend" in smollm3["vLLM"].why and smollm3["SGLang"].takes == "unknown"
    biased = told(llama(add_qkv_bias=True, add_proj_bias=True, add_ffn_bias=True))
    assert biased["vLLM"].takes == "yes" and biased["SGLang"].takes == "no"
    assert smollm3["llama.cpp"].takes == "no" and "layers 3, 7, 11" in smollm3["llama.cpp"].why
