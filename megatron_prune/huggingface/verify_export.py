"""Does the exported folder compute what the training model does? Both run on the same tokens in fp32.

    load_stock_model  the folder, loaded with `AutoModelForCausalLM` alone, every weight accounted for
    wrong_weight      the first of its weights that is not bit for bit what the checkpoint holds
    stock_logits      that model's logits
    run_stock         the same, how far fp32 rounding moves them, and whether a cache changes them
    training_logits   the training model (`PrunableLlama`) on one rank, filled with an architecture's live tensors
    sample_tokens     token ids of real text, as the exported tokenizer gives them

Elements are compared as bits, so that the logits only have to show that the same is computed with them. They are judged
by the model's own rounding: massive activations move fp32 logits by 1e-3 and more, other models' by 1e-6.

Call `stock_logits` and `run_stock` first: with CUDA there, the CPU runtime of `training_logits` redirects its calls
process-wide.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.data.tokenizer import build_tokenizer
from megatron_prune.errors import UserError
from megatron_prune.huggingface.weights import Reader, source_view
from megatron_prune.model.architecture import Architecture
from megatron_prune.model.kinds import VOCAB
from megatron_prune.model.layout import ShardLayout
from megatron_prune.model.llama import ModelOptions, build_llama, load_parameters
from megatron_prune.runtime.mesh import Mesh


def load_stock_model(folder: str | Path, trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """The model in the folder, by transformers, on the CPU.

    Args:
        trust_remote_code: run the code that is in the folder.
        dtype: to load it in; as transformers does unless given, which since version 5 rounds all weights to the dtype
            that config.json names, float32 norms of a bfloat16 model included.

    Raises:
        UserError: transformers is not installed, cannot load the folder, or had weights too many or too few.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers import __version__ as version
    except ImportError as error:
        raise UserError("loading a model needs transformers: install megatron-prune[hf]") from error
    try:
        named = "dtype" if tuple(map(int, version.split(".")[:2])) >= (4, 56) else "torch_dtype"
        options = {} if dtype is None else {named: dtype}
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True, trust_remote_code=trust_remote_code, **options
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
    """fp32 logits [B, S, vocabulary] of int64 `tokens` [B, S] from the folder, by transformers on the CPU. Raises
    UserError: as `load_stock_model`."""
    model = load_stock_model(folder, trust_remote_code)
    with torch.no_grad():
        return model.float().eval()(tokens, use_cache=False).logits


ROUNDINGS = 8
"""Two fp32 computations in different orders may differ by so many times what one differs from float64: each errs by
about one such step, and the largest of a million logits' errors varies by a small factor."""

PROMPT, GENERATED = 16, 16


@dataclass(frozen=True)
class StockRun:
    """What transformers computes from the folder.

    Attributes:
        logits: fp32 [B, S, vocabulary].
        rounding: largest difference of these from the same in float64; at least one ulp of the largest logit.
        cached: largest difference when the second half comes after a cache of the first: one token, then the others.
        generated_alike: greedy generation gives the same ids with and without cache, up to ties within rounding.
    """

    logits: Tensor
    rounding: float
    cached: float
    generated_alike: bool

    @property
    def tolerance(self) -> float:
        """How far logits may be from these without anything being wrong."""
        return ROUNDINGS * self.rounding


def run_stock(model: Any, tokens: Tensor) -> StockRun:
    """Run transformers' `model` on int64 `tokens` [B, S], S >= 2, after making it fp32 and not training."""
    model.float().eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        exact = _float64_logits(model, tokens)
        ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
        rounding = max((logits - exact).abs().max().item(), ulp)
        cached = (_cached_logits(model, tokens) - logits[:, tokens.shape[1] // 2 :]).abs().max().item()
        alike = _generates_alike(model, tokens, ROUNDINGS * rounding)
    return StockRun(logits, rounding, cached, alike)


def _float64_logits(model: Any, tokens: Tensor) -> Tensor:
    """float64 logits of an fp32 model; one module at a time is enlarged, so memory stays about the same.

    (Norms' reciprocal roots stay in fp32 in transformers. They scale a token's channels alike, to 1e-7.)
    """
    hooks = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(lambda module, _: module.double() and None))
            hooks.append(module.register_forward_hook(lambda module, *_: module.float() and None))
    try:
        return model(tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def _cached_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the second half: its first token alone behind a cache, then the others."""
    half = tokens.shape[1] // 2
    given, found = {"use_cache": True}, []
    for part in (tokens[:, :half], tokens[:, half : half + 1], tokens[:, half + 1 :]):
        if not part.shape[1]:
            continue
        output = model(part, **given)
        name = "cache" if "cache" in output else "past_key_values"  # transformers 5.24 renamed it
        given = {"use_cache": True, name: output[name]}
        found.append(output.logits)
    return torch.cat(found[1:], dim=1)


def _generates_alike(model: Any, tokens: Tensor, tolerance: float) -> bool:
    """Greedy generation of a few tokens with and without cache; a choice between equals may fall either way."""
    prompt = tokens[:, : min(PROMPT, tokens.shape[1] // 2)]
    count = min(GENERATED, tokens.shape[1] - prompt.shape[1])
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    ours, theirs = (model.generate(prompt, attention_mask=mask, use_cache=use, **options) for use in (True, False))
    for row in (ours != theirs).any(dim=1).nonzero().flatten().tolist():
        first = int((ours[row] != theirs[row]).nonzero()[0])
        logits = model(ours[row : row + 1, :first], use_cache=False).logits[0, -1]
        if not (logits[ours[row, first]] - logits[theirs[row, first]]).abs() <= 2 * tolerance:
            return False
    return True


def wrong_weight(model: Any, expected: Iterable[tuple[str, Callable[[], Tensor]]]) -> str | None:
    """The name of the first weight of transformers' `model` that is not bit for bit the expected one, or None.

    Args:
        expected: for every weight of the file: its name and a function that fetches it as it should be stored. One at
            a time is in memory.
    """
    loaded = model.state_dict()
    for name, fetch in expected:
        tensor, found = fetch(), loaded[name]
        common = torch.promote_types(found.dtype, tensor.dtype)  # which neither is rounded to
        if found.shape != tensor.shape or not torch.equal(found.to(common), tensor.to(common)):
            return name
    return None


def training_logits(read: Reader, architecture: Architecture, tokens: Tensor, mesh: Mesh) -> Tensor:
    """fp32 logits [B, S, vocabulary] of int64 `tokens` [B, S] from the training model on a mesh of one rank.

    Args:
        read: Hugging Face name -> the live tensor.
    """
    assert mesh.tp_size == mesh.pp_size == 1
    layout = ShardLayout.pack(architecture, 1, {VOCAB: 1})
    model = build_llama(architecture.shape, layout, mesh, ModelOptions(seq_length=tokens.shape[1]))
    with torch.no_grad():
        load_parameters(model, architecture.table, layout, mesh, source_view(read, architecture))
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
