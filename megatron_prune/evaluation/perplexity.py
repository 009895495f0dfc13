"""How well a model predicts: its mean loss over a corpus, and what follows from it.

The loss is the natural logarithm's, per token, over all labels that count; for full windows it is what training calls
validation loss. Per byte and per word it is the same total shared among the text's bytes and words, which models with
different tokenizers may be compared by; ids that frame documents cost nats and have no bytes.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_prune.evaluation.corpora import IGNORED, Corpus, batches


@dataclass(frozen=True)
class Perplexity:
    """One model on one corpus.

    Attributes:
        data: the corpus's name.
        windows, tokens, seq_length: how much was predicted, and how.
        loss: nats per token.
        loss_stderr: standard error of that mean over windows, as far as windows are independent; None for a single one.
        perplexity: exp(loss).
        bits_per_byte, word_perplexity: None where the text is not known.
        tokens_per_second: speed of the evaluation.
    """

    data: str
    windows: int
    tokens: int
    seq_length: int
    loss: float
    loss_stderr: float | None
    perplexity: float
    bits_per_byte: float | None
    word_perplexity: float | None
    tokens_per_second: float


@torch.no_grad()
def measure(
    model: Any, corpus: Corpus, batch_size: int, device: str, on_progress: Callable[[int], None] = lambda _: None
) -> Perplexity:
    """Predict every window of `corpus`.

    Args:
        model: of transformers, on `device`.
        on_progress: told the number of windows done by each batch.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    start = time.perf_counter()
    for numbers in batches(corpus.windows, batch_size):
        tokens, labels = (torch.stack(rows) for rows in zip(*(corpus.windows[number] for number in numbers)))
        logits = model(tokens.to(device), use_cache=False).logits
        # Row by row: logits of a whole batch in fp32 can be the largest tensor by far.
        sums.extend(
            cross_entropy(row.float(), label.to(device), ignore_index=IGNORED, reduction="sum").double().cpu()
            for row, label in zip(logits, labels)
        )
        counts.extend((labels != IGNORED).sum(1))
        on_progress(len(numbers))
    seconds = time.perf_counter() - start
    return _summary(corpus, torch.stack(sums), torch.stack(counts).double(), tokens.shape[1], seconds)


def _summary(corpus: Corpus, sums: Tensor, counts: Tensor, seq_length: int, seconds: float) -> Perplexity:
    total, tokens = float(sums.sum()), int(counts.sum())
    loss = total / tokens
    stderr = None
    if len(sums) > 1:
        # Of a ratio of sums: windows count by their tokens.
        residual = sums - loss * counts
        stderr = float(residual.square().sum().sqrt()) * math.sqrt(len(sums) / (len(sums) - 1)) / tokens
    return Perplexity(
        data=corpus.name,
        windows=len(sums),
        tokens=tokens,
        seq_length=seq_length,
        loss=loss,
        loss_stderr=stderr,
        perplexity=_exp(loss),
        bits_per_byte=total / math.log(2) / corpus.text_bytes if corpus.text_bytes else None,
        word_perplexity=_exp(total / corpus.words) if corpus.words else None,
        tokens_per_second=tokens / max(seconds, 1e-9),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
