"""Turn a checkpoint, of any layout and at any time of the run, into a folder that transformers loads.

    megatron-prune convert-to-hf --load checkpoints/run --save exported --verify

Live units only, one tensor in memory at a time, with tokenizer, generation config and model card. Stock classes load
it; with `--kv-policy cluster` it brings code of its own (`trust_remote_code=True`). `--verify` loads the folder with
transformers and compares its weights and its logits on text, with and without a cache, with the training model's, and
the tokenizer's ids, special tokens and chats with those it was made from; where it fails, the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_prune.commands.running import NOTHING_WRITTEN, run_command, say
from megatron_prune.config.options import option
from megatron_prune.errors import UserError
from megatron_prune.reading import read_words

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.checkpoint.reader import CheckpointReader
    from megatron_prune.huggingface.export import Exported
    from megatron_prune.huggingface.model_card import CardFacts
    from megatron_prune.model.architecture import Architecture

SEQUENCES, LENGTH = 4, 256  # of text, to compare logits on
COMPARED, LINES = 100_000, 500  # characters and single lines of it, to compare ids on


@dataclass(frozen=True)
class ExportOptions:
    """The command's options."""

    load: str | None = option(None, "a run's folder, or one of its iter_... folders", metavar="DIR")
    ckpt_step: int | None = option(None, "iteration; the newest unless given")
    save: str | None = option(None, "folder to write; must not hold anything", metavar="DIR")
    overwrite: bool = option(False, "replace an earlier export in the folder; other files in it stay")
    kv_policy: str = option(
        "auto",
        "native: grouped-query attention as it is; expand: KV heads repeated, one per query head; cluster: every "
        "layer's live KV heads, with the model's code; auto: native where it is exact, else expand",
        metavar="P",
    )
    dtype: str | None = option(
        None, "float32, bfloat16 or float16; the source's unless given, its norms' apart", metavar="T"
    )
    max_shard_size: str = option("5GB", "of one weight file", metavar="SIZE")
    tokenizer_model: str | None = option(
        None, "file or folder; the one recorded in the checkpoint unless given", metavar="PATH"
    )
    tokenizer_type: str | None = option(None, "seen from --tokenizer-model unless given", metavar="KIND")
    allow_other_tokenizer: bool = option(False, "export one that is not the training data's, by its fingerprint")
    no_tokenizer: bool = option(False, "export without a tokenizer")
    base_model: str | None = option(
        None, "the source's id on a model hub, for the model card; as known unless given", metavar="ID"
    )
    license: str | None = option(
        None, "of the model, for the model card; the one in the source's card unless given", metavar="ID"
    )
    verify: bool = option(False, "compare weights and logits with stock transformers, cached steps too")
    verify_text: str | None = option(
        None, "text to compare on; Python's own reference texts unless given", metavar="FILE"
    )
    verify_tolerance: float | None = option(
        None, "largest difference of fp32 logits; judged by the model's own rounding unless given"
    )
    deploy_check: bool = option(False, "say which runtimes take this shape, and why not (docs/deploy.md)")
    refresh_code: str | None = option(
        None, "only bring the code in an export of --kv-policy cluster up to date", metavar="DIR"
    )


def convert(arguments: ExportOptions) -> int:
    """Export and, where asked, verify; the exit status, 1 when the verification failed. Raises UserError."""
    if arguments.refresh_code is not None:
        return refresh(arguments.refresh_code, bool(arguments.load or arguments.save))
    for flag, value in (("--load", arguments.load), ("--save", arguments.save)):
        if value is None:
            raise UserError(f"{flag} is not given: --load and --save are needed (or --refresh-code)")
    assert arguments.load is not None and arguments.save is not None
    from megatron_prune.checkpoint.reader import CheckpointReader
    from megatron_prune.huggingface.export import export
    from megatron_prune.huggingface.provenance import dtypes_of, source_of
    from megatron_prune.huggingface.shards import dtype_name
    from megatron_prune.huggingface.trained_with import check_tokenizer
    from megatron_prune.huggingface.weights import layers_left

    if arguments.verify and find_spec("transformers") is None:
        raise UserError("--verify needs transformers: install megatron-prune[hf]")
    reader = CheckpointReader(arguments.load, arguments.ckpt_step)
    tokenizer_type, tokenizer = choose_tokenizer(arguments, reader)
    dtype, others = (arguments.dtype, {}) if arguments.dtype else dtypes_of(reader.meta, reader.record.facts.dtype)
    with tqdm(total=len(reader.names), unit="tensor", desc="exporting", disable=not sys.stderr.isatty()) as bar:

        def read(hf_name: str) -> Any:
            bar.update()
            return reader.read(hf_name)

        done = export(
            read,
            reader.architecture,
            arguments.save,
            dtype=dtype,
            other_dtypes=others,
            kv_policy=arguments.kv_policy,
            tokenizer_model=tokenizer,
            tokenizer_type=tokenizer_type,
            check_tokenizer=lambda found: check_tokenizer(found, reader.meta, arguments.allow_other_tokenizer),
            max_shard_size=arguments.max_shard_size,
            source=source_of(reader.meta),
            facts=card_facts(arguments, reader),
            overwrite=arguments.overwrite,
        )
    read_left, a = layers_left(reader.read, reader.architecture)
    say(
        f"{done.folder}: {done.class_name}, iteration {reader.record.iteration}, {a.parameters:,} parameters "
        f"({a.described()}), {done.stored_parameters:,} stored in {dtype_name(done.dtype)} in {len(done.files)} "
        f"file{'s' if len(done.files) > 1 else ''}"
    )
    say(f"KV heads: {kv_heads(done, a)}")
    say(f"tokenizer: {tokenizer or 'none'}")
    if arguments.deploy_check:
        from megatron_prune.data.hub_files import read_json
        from megatron_prune.huggingface.deployment import table, verdicts

        say(table(list(verdicts(read_json(Path(done.folder) / "config.json")))))
    if not arguments.verify:
        return 0
    is_same = tokenizer is None or verify_tokenizer(arguments, done, tokenizer, tokenizer_type)
    return 0 if verify(arguments, read_left, a, done, tokenizer) and is_same else 1


def refresh(folder: str, has_others: bool) -> int:
    """Bring the code in an export up to date; `has_others`: --load or --save are given as well, which is refused."""
    from megatron_prune.huggingface.cluster import refresh_code

    if has_others:
        raise UserError("--refresh-code changes the code in DIR and nothing else: it goes without --load and --save")
    say(f"{folder}: {' and '.join(refresh_code(folder)) or 'nothing'} brought up to date")
    return 0


def card_facts(arguments: ExportOptions, reader: CheckpointReader) -> CardFacts:
    """What the model card says: the run's facts, and what was given here."""
    from megatron_prune.huggingface.provenance import run_facts

    facts = run_facts(reader.meta)
    licence = {"license": arguments.license} if arguments.license else facts.licence
    return dataclasses.replace(facts, base_model=arguments.base_model or facts.base_model, licence=licence)


def kv_heads(done: Exported, architecture: Architecture) -> str:
    """Which policy is in force, why, and what it costs."""
    from megatron_prune.huggingface.kv_policy import EXPAND

    plan = done.plan
    counts = sorted(set(plan.kv_heads))
    stored = f"{counts[0]} of every layer" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} of a layer"
    text = f"{plan.policy}, {stored} stored, cache of {plan.cache_elements(architecture):,} elements per token"
    if plan.policy == EXPAND and plan.obstacle:
        compact = architecture.kv_cache_channels
        text += f" (native is not exact: {plan.obstacle}; --kv-policy cluster would have {compact:,})"
    return text


def choose_tokenizer(arguments: ExportOptions, reader: CheckpointReader) -> tuple[str | None, str | None]:
    """(kind, path); the path is None when there is none to export."""
    from megatron_prune.huggingface.provenance import tokenizer_of

    if arguments.no_tokenizer:
        return None, None
    if arguments.tokenizer_model:
        return arguments.tokenizer_type, arguments.tokenizer_model
    recorded = tokenizer_of(reader.meta)
    if recorded is None:
        say("no tokenizer is recorded in the checkpoint: exporting without; name one with --tokenizer-model")
        return None, None
    kind, path = recorded
    if not Path(path).exists():
        raise UserError(
            f"the tokenizer recorded in the checkpoint, {path}, is gone; name it with --tokenizer-model, or export "
            "without by --no-tokenizer"
        )
    return arguments.tokenizer_type or kind, path


def verify_tokenizer(arguments: ExportOptions, done: Exported, tokenizer: str, kind: str | None) -> bool:
    """Compare the folder's tokenizer with the one it comes from (ids, special tokens, chats); prints the outcome."""
    from megatron_prune.data.tokenizer_files import find_tokenizer
    from megatron_prune.huggingface.tokenizer_copy import compare_tokenizers

    text = read_text(arguments.verify_text)[:COMPARED]
    texts = [text, *filter(None, text.splitlines()[:LINES])]
    try:
        chats = compare_tokenizers(find_tokenizer(tokenizer, kind), done.folder, texts)
    except UserError as error:
        say(f"verify: the tokenizer is NOT the same: {error}")
        return False
    say(
        f"verify: the tokenizer gives the same ids on {len(text):,} characters of text, has the same special tokens "
        f"and renders {len(chats)} chats alike"
    )
    return True


def verify(
    arguments: ExportOptions,
    read: Callable[[str], Any],
    architecture: Architecture,
    done: Exported,
    tokenizer: str | None,
) -> bool:
    """Compare the folder's weights and logits with the training model's, also with a cache; prints each outcome."""
    import torch
    from transformers.utils import logging as transformers_logging

    from megatron_prune.huggingface.export import stored_weights
    from megatron_prune.huggingface.kv_policy import CLUSTER
    from megatron_prune.huggingface.verify_export import (
        ROUNDINGS,
        load_stock_model,
        run_stock,
        sample_tokens,
        wrong_weight,
    )

    text = read_text(arguments.verify_text)
    length = min(LENGTH, architecture.shape.max_position_embeddings)
    has_tokenizer = tokenizer is not None
    tokens = sample_tokens(
        done.folder if has_tokenizer else None, text, architecture.shape.vocab_size, SEQUENCES, length
    )
    transformers_logging.disable_progress_bar()
    model = load_stock_model(done.folder, trust_remote_code=done.plan.policy == CLUSTER, dtype=torch.float32)
    wrong = wrong_weight(model, stored_weights(read, architecture, done.plan, done.dtypes))
    exported = run_stock(model, tokens)
    del model
    trained = trained_logits(read, architecture, done, tokens)
    asked = arguments.verify_tolerance
    limit = exported.tolerance if asked is None else asked
    difference = (exported.logits - trained).abs().max().item()
    what = (
        f"{ROUNDINGS} times this model's own fp32 rounding ({exported.rounding:.1e})" if asked is None else f"{asked:g}"
    )
    close = difference <= limit  # False for NaN
    say(
        f"verify: {tokens.numel():,} {'tokens of text' if has_tokenizer else 'random ids'}; logits (up to "
        f"{trained.abs().max().item():.1f}) of transformers and of the training model differ by at most "
        f"{difference:.2e}, {'within' if close else 'NOT WITHIN'} {what}"
    )
    is_cached = exported.cached <= exported.tolerance
    say(
        f"verify: steps with a cache differ from those without by at most {exported.cached:.2e}, "
        f"{'within' if is_cached else 'NOT WITHIN'} {ROUNDINGS} times rounding; greedy generation with and without it "
        f"{'gives the same' if exported.generated_alike else 'DIFFERS'}"
    )
    say(
        "verify: "
        + (f"{wrong} is NOT what the checkpoint holds" if wrong else "every weight is bit for bit as in the checkpoint")
    )
    return close and is_cached and exported.generated_alike and wrong is None


def trained_logits(read: Callable[[str], Any], architecture: Architecture, done: Exported, tokens: Tensor) -> Tensor:
    """The training model's, of weights rounded as the export's: what then differs, the export did wrong."""
    from megatron_prune.huggingface.verify_export import training_logits
    from megatron_prune.runtime.mesh import meshed

    with meshed() as mesh:
        return training_logits(lambda name: read(name).to(done.dtypes.of(name)), architecture, tokens, mesh)


def read_text(file: str | None) -> str:
    """Text to compare on: a file's, or what every Python installation carries. Raises UserError."""
    if file is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return read_words(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--verify-text {file}: cannot be read: {error}") from error


main = partial(run_command, "convert-to-hf", ExportOptions, convert, interrupted=NOTHING_WRITTEN)
