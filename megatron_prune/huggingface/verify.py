"""Does the exported folder compute what the training model does? Both run on the same tokens in fp32.

    load_stock_model  the folder, loaded with `AutoModelForCausalLM` alone, every weight accounted for
    stock_logits      that model's logits
    training_logits   the training model (`PrunableLlama`) on one rank, filled with an architecture's live tensors
    sample_tokens     token ids of real text, as the exported tokenizer gives them

Call `stock_logits` first: with CUDA there, the CPU runtime of `training_logits` redirects its calls process-wide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.weights import Reader
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.layout import Quanta, ShardLayout
from megatron_prune.model.llama import ModelOptions, build_llama, named_rows
from megatron_prune.model.param_axes import ParamTable
from megatron_prune.runtime.mesh import Mesh


def load_stock_model(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The model in the folder, by transformers, on the CPU.

    Args:
        trust_remote_code: run the code that is in the folder.

    Raises:
        UserError: transformers is not installed, cannot load the folder, or had weights too many or too few.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError("loading a model needs transformers: install megatron-prune[hf]") from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {str(error).partition(chr(10))[0]}") from error
    leftovers = {kind: sorted(map(str, report.get(kind, ()))) for kind in ("missing_keys", "unexpected_keys")}
    leftovers["mismatched_keys"] = [str(entry) for entry in report.get("mismatched_keys", ())]
    complaints = [f"{kind}: {', '.join(names[:10])}" for kind, names in leftovers.items() if names]
    if complaints:
        raise UserError(f"{folder}: transformers loads it with {'; '.join(complaints)}")
    return model


def stock_logits(folder: str | Path, tokens: Tensor, trust_remote_code: bool = False) -> Tensor:
    """fp32 logits [B, S, vocabulary] of int64 `tokens` [B, S] from the folder, by transformers on the CPU.

    Raises:
        UserError: as `load_stock_model`.
    """
    model = load_stock_model(folder, trust_remote_code)
    with torch.no_grad():
        return model.float().eval()(tokens, use_cache=False).logits


def training_logits(read: Reader, architecture: Architecture, tokens: Tensor, mesh: Mesh) -> Tensor:
    """fp32 logits [B, S, vocabulary] of int64 `tokens` [B, S] from the training model on a mesh of one rank.

    Args:
        read: Hugging Face name -> the live tensor.
    """
    assert mesh.tp_size == mesh.pp_size == 1
    # Nothing is rounded up: slots are the live units in order; empty ones (fewer KV heads than elsewhere) come last.
    layout = ShardLayout.pack(architecture, 1, Quanta(vocab=1))
    model = build_llama(architecture.shape, layout, mesh, ModelOptions(seq_length=tokens.shape[1]))
    with torch.no_grad():
        for _, parameter, row in named_rows(model, ParamTable.build(architecture.shape)):
            for part, start, end in row.part_rows(layout, 0):
                tensor = read(part.hf_name)
                stored = parameter[start:end].zero_()
                stored[tuple(slice(0, length) for length in tensor.shape)].copy_(tensor)
        positions = torch.arange(tokens.shape[1], device=mesh.device.device).unsqueeze(0)
        return model.eval()(tokens.to(mesh.device.device), positions, None).float().cpu()


def sample_tokens(folder: str | Path | None, text: str, vocab_size: int, sequences: int, length: int) -> Tensor:
    """int64 [sequences, length]: how `text` begins, in the ids of the tokenizer in `folder`; repeated if too short.

    With no tokenizer there (None) the ids are random.
    """
    if folder is None:
        return torch.randint(vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    tokenizer = build_tokenizer(None, str(folder))
    ids = tokenizer.tokenize(text[: 16 * sequences * length])
    if not ids:
        raise UserError(f"--verify-text: {folder}'s tokenizer makes no ids of it; name a file with text")
    ids = (ids * (-(-sequences * length // len(ids))))[: sequences * length]
    return torch.tensor(ids, dtype=torch.int64).view(sequences, length)
