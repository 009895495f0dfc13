"""A whole tiny run from files, as `pretrain` takes it: source model, tokenizer, data, and the command line.

The model has 20,000 parameters and an iteration takes some hundredths of a second, so a run that removes all kinds of
groups and trains on fits into a second or two.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.data.preprocess import Options, preprocess
from megatron_prune.testing.helpers.tiny_models import random_llama_weights, tiny_config, write_hf_folder

VOCABULARY = 64
PRUNING_ITERATIONS, CONTINUED_ITERATIONS = 40, 4  # the first is a limit: the target is reached before
_BATCH, _SEQ = 2, 32


@dataclass(frozen=True)
class TinyRun:
    """Files of a run."""

    folder: Path

    @property
    def source(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "source"

    def data(self, number: int = 0) -> Path:
        """Prefix of one of two data sets."""
        return self.folder / f"data_{number}"

    def arguments(self, save: Path, *more: object) -> list[str]:
        """The command line of a run that starts from the source, or goes on from `save` where something is saved."""
        words: tuple[object, ...] = (
            *("--hf-model", self.source, "--tokenizer-model", self.folder / "tokenizer.model"),
            *("--data-path", 3, self.data(0), 1, self.data(1), "--data-cache-path", self.folder / "cache"),
            *("--split", "80,20,0", "--seq-length", _SEQ, "--micro-batch-size", 1, "--global-batch-size", _BATCH),
            *("--train-iters", PRUNING_ITERATIONS, "--continue-tokens", CONTINUED_ITERATIONS * _BATCH * _SEQ),
            *("--lr", "2e-3", "--lr-warmup-iters", 3, "--continue-lr-warmup-iters", 2, "--device", "cpu"),
            *("--make-vocab-size-divisible-by", 8, "--prune-target-params", 11_400, "--prune-ratio", "2:1"),
            *("--prune-gqa", "cluster", "--prune-groups", "head.cost=2", "head.floor=2", "ffn.floor=38"),
            *("--eval-interval", 1000, "--eval-iters", 1, "--log-interval", 1, "--progress", "lines", "--no-report"),
            *("--save", save, "--load", save),
        )
        return [str(word) for word in (*words, *more)]


def prepare(folder: Path, layers: int = 2) -> TinyRun:
    """Write a source model of so many layers, tokenizer and two data sets into `folder` (made when absent)."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        "\n\n".join(f"the quick brown {beast} number {i} jumps over {i * 7} lazy dogs" for i in range(400))
        for beast in ("fox", "cat")
    ]
    for number, text in enumerate(texts):
        (folder / f"text_{number}.txt").write_text(text)
    model = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text_0.txt"), model_prefix=str(model), vocab_size=VOCABULARY, minloglevel=2
    )
    config = tiny_config(vocab_size=VOCABULARY, num_hidden_layers=layers, num_key_value_heads=2)
    write_hf_folder(folder / "source", config, random_llama_weights(config))
    run = TinyRun(folder)
    for number in range(len(texts)):
        options = Options(tokenizer_model=f"{model}.model", overwrite=True)
        preprocess([str(folder / f"text_{number}.txt")], str(run.data(number)), options)
    return run
