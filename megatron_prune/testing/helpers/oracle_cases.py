"""Which layouts, models and rules are compared with the oracle.

`PAIRWISE` covers every pair of values of the factors of `FACTORS` at least once (checked by a test); `everything` is
the whole product of layouts and models, with drawn options, for the full run. `SPECIAL` adds what the factors leave
out: criteria, Fisher estimates, other families, recomputation, uneven stages, coarse quanta.
"""

import itertools
import random
from collections.abc import Mapping
from typing import Any

from megatron_prune.model.layout import Quanta
from megatron_prune.testing.helpers.sharded import Case, rounded
from megatron_prune.testing.helpers.tiny_models import tiny_config
from megatron_prune.testing.reference import oracle_scores
from megatron_prune.testing.reference.oracle_settings import LinearDecay

MODELS = {
    "mha": tiny_config(intermediate_size=64),
    "gqa-tied": tiny_config(intermediate_size=64, num_attention_heads=6, num_key_value_heads=3),
    "gqa-untied": tiny_config(
        intermediate_size=61, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False, vocab_size=61
    ),
    "mqa": tiny_config(intermediate_size=64, num_attention_heads=4, num_key_value_heads=1),
    "qwen2": tiny_config(intermediate_size=64, model_type="qwen2", num_attention_heads=6, num_key_value_heads=3),
    "qwen3": tiny_config(intermediate_size=64, model_type="qwen3", num_attention_heads=6, num_key_value_heads=2),
}
OLMO2 = tiny_config(intermediate_size=64, model_type="olmo2", num_attention_heads=6, num_key_value_heads=3)
KINDS = {
    "all": oracle_scores.KINDS,
    **{kind: (kind,) for kind in oracle_scores.KINDS},
    "layers": oracle_scores.ALL_KINDS,
}

LAYOUTS_AND_MODELS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 3),
    "pp": (1, 2),
    "dp": (1, 2),
    "sequence_parallel": (False, True),
    "distributed_optimizer": (False, True),
    "overlap": (False, True),
    "kinds": tuple(KINDS),
    "model": ("mha", "gqa-tied", "gqa-untied", "mqa"),
    "gqa": ("kv_group", "uniform", "cluster"),
}
# What a layout does not have to do with, and every combination of which is possible.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "schedule": {
        "ratio": {},
        "cubic": {"schedule": "cubic", "curve": (96, 1200)},
        "linear": {"schedule": "linear", "curve": (0, 900)},
    },
    "lr": {"constant": {}, "whole_run": {"lr": LinearDecay(3e-3, 60)}},
    # A first step of Adam is the gradient's sign where that is far above eps: rounding turns whatever is near zero, and
    # with a first step in every iteration the turns add up. With this eps, a tenth of the usual element, they do not.
    "adam": {"carry": {}, "reset": {"optimizer_state": "reset", "eps": 1e-3}},
    "loss": {"plain": {}, "distilled": {"distillation": (0.7, 2.0)}},
}
FACTORS = LAYOUTS_AND_MODELS | {name: tuple(values) for name, values in OPTIONS.items()}

# tp pp dp sp do ov kinds model gqa schedule lr adam loss
_ROWS = """
1 1 1 -  do -- head mqa        uniform  cubic  whole_run carry plain
2 1 2 sp -- ov stem gqa-untied cluster  ratio  constant  carry plain
2 2 1 -- -- -- ffn  mha        kv_group linear constant  carry distilled
1 2 2 -- do ov all  gqa-tied   cluster  linear constant  reset plain
3 1 1 sp do -- all  gqa-tied   kv_group linear constant  carry distilled
1 2 1 -- do -- stem gqa-untied uniform  cubic  whole_run reset distilled
2 1 2 sp -- ov ffn  mqa        uniform  cubic  whole_run carry distilled
2 1 2 sp do ov head mha        kv_group cubic  constant  carry distilled
3 1 1 -- -- -- head mha        cluster  linear whole_run carry plain
2 2 1 sp -- -- all  gqa-tied   uniform  ratio  constant  reset plain
1 1 2 -- do -- ffn  gqa-untied kv_group ratio  constant  reset distilled
1 1 1 -- -- -- stem mha        kv_group ratio  whole_run reset plain
3 1 1 -- do -- stem mqa        uniform  linear constant  carry distilled
1 2 1 -- do -- all  mqa        cluster  ratio  whole_run reset distilled
3 1 1 sp -- -- ffn  gqa-tied   cluster  cubic  constant  carry plain
1 2 1 -- -- -- head gqa-tied   cluster  ratio  whole_run carry distilled
3 1 1 -- do -- head gqa-untied cluster  ratio  constant  reset distilled
1 1 1 -- -- -- all  gqa-untied uniform  linear constant  reset plain
1 1 1 -- do -- all  mha        cluster  cubic  constant  carry plain
1 1 1 -- do -- stem gqa-tied   kv_group linear whole_run carry distilled
2 2 1 sp -- -- layers gqa-untied cluster  ratio  constant  carry plain
3 1 1 -- -- -- layers mqa        uniform  linear constant  reset plain
1 2 2 -- do ov layers mha        kv_group cubic  whole_run carry distilled
1 1 2 -- do -- layers gqa-tied   kv_group ratio  whole_run reset distilled
"""


def is_possible(factors: Mapping[str, Any]) -> bool:
    """Whether a combination means something on at most four ranks."""
    return not (
        factors["tp"] * factors["pp"] * factors["dp"] > 4
        or (factors["sequence_parallel"] and factors["tp"] == 1)
        or (factors["overlap"] and factors["dp"] == 1)
        or (factors["gqa"] == "uniform" and factors["model"] == "mha")
        or (factors["gqa"] == "kv_group" and factors["model"] == "mqa")
    )


def _parse(line: str) -> dict[str, Any]:
    tp, pp, dp, sp, do, ov, *words = line.split()
    values = (int(tp), int(pp), int(dp), sp == "sp", do == "do", ov == "ov", *words)
    return dict(zip(FACTORS, values, strict=True))


PAIRWISE = [_parse(line) for line in _ROWS.strip().splitlines()]


def everything() -> list[dict[str, Any]]:
    """All possible combinations of layouts and models, each with a choice of options."""
    draw, product = random.Random(0), itertools.product(*LAYOUTS_AND_MODELS.values())
    combinations = (dict(zip(LAYOUTS_AND_MODELS, values, strict=True)) for values in product)
    return [
        factors | {name: draw.choice(tuple(values)) for name, values in OPTIONS.items()}
        for factors in combinations
        if is_possible(factors)
    ]


OracleCase = tuple[Case, dict[str, Any], dict[str, Any]]  # case, HF config, fields of OracleSettings
EXACT, COARSE = rounded(vocab=8), rounded(ffn=4, stem=4, vocab=8)


def case_of(factors: Mapping[str, Any], quanta: Quanta = EXACT) -> OracleCase:
    """(case, HF config, settings) of one combination; exact quanta compact after every removal, which takes time."""
    layout = {name: factors[name] for name in list(FACTORS)[:6]}
    settings = {"types": KINDS[factors["kinds"]], "gqa": factors["gqa"]}
    if oracle_scores.LAYER in settings["types"]:
        settings |= {"min_layers": factors["pp"], "group_cost": {oracle_scores.HEAD: 3, oracle_scores.LAYER: 3}}
    for name, values in OPTIONS.items():
        settings |= values[factors[name]]
    return Case(**layout, quanta=quanta), MODELS[factors["model"]], settings


def name_of(factors: Mapping[str, Any]) -> str:
    """The test id of a case."""
    return "-".join((case_of(factors)[0].name, *(factors[name] for name in list(FACTORS)[6:])))


SPECIAL: dict[str, OracleCase] = {
    "fisher-adam": (Case(pp=2, dp=2, distributed_optimizer=True, quanta=COARSE), MODELS["mha"], {"fisher": "adam"}),
    "two-per-step": (Case(tp=2, dp=2, distributed_optimizer=True), MODELS["gqa-tied"], {"ratio": (2, 1)}),
    "qwen2": (Case(tp=2, pp=2, sequence_parallel=True, quanta=COARSE), MODELS["qwen2"], {"gqa": "cluster"}),
    "qwen3": (
        Case(tp=2, dp=2, recompute="full", quanta=COARSE),
        MODELS["qwen3"],
        {"criterion": "taylor_first", "head_score": "sum"},
    ),
    "layers-without-positions-and-biases": (
        Case(tp=2, pp=2, sequence_parallel=True, quanta=COARSE),
        tiny_config(
            intermediate_size=64,
            model_type="smollm3",
            num_attention_heads=6,
            num_key_value_heads=3,
            no_rope_layers=[1, 0, 1, 0],
            attention_bias=True,
            mlp_bias=True,
        ),
        {"gqa": "cluster"},
    ),
    "norms-behind": (  # OLMo 2: queries and keys are normed over the heads of all ranks
        Case(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, quanta=COARSE),
        OLMO2,
        {"gqa": "kv_group", "ratio": (2, 1)},
    ),
    "coarse-quanta": (
        Case(dp=2, distributed_optimizer=True, quanta=rounded(ffn=8, stem=8, vocab=8)),
        MODELS["mqa"],
        {"gqa": "cluster", "normalize": "none"},
    ),
    "uneven-stages": (
        Case(pp=2, first_stage_layers=1),
        MODELS["gqa-untied"],
        {"criterion": "obd", "fisher_unit": "token", "gqa": "cluster"},
    ),
    "recompute-core": (
        Case(tp=2, recompute="selective", quanta=rounded(head=2, ffn=8, stem=4, vocab=8)),
        MODELS["mha"],
        {"criterion": "magnitude"},
    ),
    "second-order": (
        Case(tp=2, dp=2, distributed_optimizer=True, overlap=True, quanta=COARSE),
        MODELS["gqa-untied"],
        {"second_order": True, "gqa": "cluster"},
    ),
    "second-order-obc": (
        Case(pp=2, dp=2, recompute="full"),
        MODELS["gqa-tied"],
        {"second_order": True, "criterion": "obc", "ratio": (2, 1), "damping": 0.05},
    ),
    "minitron": (
        Case(tp=2, sequence_parallel=True, quanta=COARSE),
        MODELS["qwen2"],
        {"criterion": "minitron", "ratio": (2, 1)},
    ),
    "cubic-curve": (  # several groups an iteration at first, one learning rate schedule over both phases
        Case(tp=2, dp=2, distributed_optimizer=True, overlap=True, quanta=COARSE),
        MODELS["gqa-tied"],
        {"schedule": "cubic", "curve": (96, 1200), "lr": LinearDecay(3e-3, 60)},
    ),
    "linear-curve": (
        Case(pp=2, first_stage_layers=1, quanta=COARSE),
        MODELS["gqa-untied"],
        {"schedule": "linear", "curve": (0, 900), "gqa": "cluster", "lr": LinearDecay(3e-3, 60)},
    ),
    "distilled-scored-plainly": (
        Case(tp=2, pp=2, sequence_parallel=True, quanta=COARSE),
        MODELS["gqa-untied"],
        {"distillation": (1.0, 1.0), "distilled_scores": "cross_entropy", "gqa": "cluster", "ratio": (1, 2)},
    ),
    "taylor-signed": (
        Case(tp=2, sequence_parallel=True, dp=2, distributed_optimizer=True, quanta=COARSE),
        MODELS["gqa-tied"],
        {"criterion": "taylor_signed", "fisher_unit": "token", "schedule": "cubic", "curve": (0, 1100)},
    ),
    "taylor-signed-stages": (
        Case(pp=2, dp=2, overlap=True, first_stage_layers=1, quanta=COARSE),
        MODELS["gqa-untied"],
        {"criterion": "taylor_signed", "gqa": "uniform", "saliency_momentum": 0.0, "ratio": (2, 1)},
    ),
    "taylor-signed-raw": (
        Case(tp=3, quanta=COARSE),
        MODELS["gqa-untied"],
        {"criterion": "taylor_signed", "fisher_unit": "token", "gqa": "cluster", "normalize": "none"},
    ),
    "taylor-second": (
        Case(tp=3, quanta=COARSE),
        MODELS["gqa-untied"],
        {"criterion": "taylor_second", "fisher": "batch"},
    ),
}
