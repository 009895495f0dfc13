"""A source model, a tokenizer and data that go together, for whatever starts from files."""

import pytest
import sentencepiece

from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

VOCABULARY = 64


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A source model, its tokenizer and data that go together."""
    folder = tmp_path_factory.mktemp("inputs")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"the quick brown fox number {i} jumps over {i * 7} lazy dogs" for i in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        normalization_rule_name="identity",  # the usual one takes seconds to export: tests/huggingface has it
        minloglevel=2,
    )
    hf_config = tiny_config(vocab_size=VOCABULARY)
    write_hf_folder(folder / "source", hf_config, random_llama_weights(hf_config))
    preprocess([str(text)], str(folder / "data"), Options(tokenizer_model=str(folder / "tokenizer.model")))
    return folder
