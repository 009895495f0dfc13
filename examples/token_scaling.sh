#!/usr/bin/env bash
# How many tokens should pruning take? One run per ratio of pruning steps to gradient steps, everything else alike; then
# a table and the paper's Figures 5 and 2. docs/token_scaling.md shows what comes out.
#
#   bash examples/token_scaling.sh CONFIG OUT                                 # 4:1, 2:1, 1:1 and 1:9, one after another
#   bash examples/token_scaling.sh CONFIG OUT --ratios "8:1 1:1" -- --continue-tokens 1B
#   bash examples/token_scaling.sh CONFIG OUT --slurm "--nodes 8 --gpus-per-node 8 --time 24:00:00"
#   bash examples/token_scaling.sh CONFIG OUT --collect                       # only the table and the figures
#
# OUT/ratio_1-9 and so on hold the runs. The same command again skips finished runs and goes on with the others. With
# --slurm the runs are a job array, and a last small job collects. CONFIG should evaluate (training.eval_interval).
# --stage NAMES: stages of each run (prune,continue); with export,evaluate there is accuracy to draw, too.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\n' "${*//[[:cntrl:]]/?}" >&2 # a terminal would obey them
    exit 2
}
# One word, for a line of ARRAY_FLAGS and for sh: in single quotes, and '"'"' for one of those.
quoted() { printf "'%s'" "${1//\'/\'\"\'\"\'}"; }
config=${1:-} out=${2:-}
[ -n "$config" ] && [ -n "$out" ] || fail "usage: token_scaling.sh CONFIG OUT [--ratios LIST] [--slurm OPTIONS | --collect] [-- flags]"
[ -f "$config" ] || fail "$config: no such file"
[[ $config != -* ]] || config=./$config
[[ $out != -* ]] || out=./$out
shift 2
ratios="4:1 2:1 1:1 1:9" stages=prune,continue slurm="" collect=""
while [ $# -gt 0 ]; do
    case $1 in
    --ratios) ratios=${2:?--ratios needs a list} && shift 2 ;;
    --stage) stages=${2:?--stage needs names} && shift 2 ;;
    --slurm) slurm=${2?--slurm needs options for sbatch} && slurm=" $slurm" && shift 2 ;;
    --collect) collect=yes && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; flags of the training go after --" ;;
    esac
done
for word in "$config" "$out" "$root" "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "names and flags must be free of line ends and other control characters: $(printf %q "$word")"
done
for ratio in $ratios; do
    [[ $ratio =~ ^[1-9][0-9]*:[1-9][0-9]*$ ]] || fail "--ratios: expected pruning steps : gradient steps, such as 1:9, got $ratio"
done

tabulate() { "$PYTHON" "$root/tools/token_scaling.py" --runs "$out"/ratio_* --output-dir "$out"; }

mkdir -p "$out"
if [ -n "$collect" ]; then
    tabulate
elif [ -n "$slurm" ]; then
    out=$(CDPATH="" cd -- "$out" && pwd)
    tasks=0
    : >"$out/array_flags.txt"
    for ratio in $ratios; do
        for word in "$@" --prune-schedule ratio --prune-ratio "$ratio" --save "$out/ratio_${ratio/:/-}"; do
            quoted "$word" && printf ' '
        done >>"$out/array_flags.txt"
        echo >>"$out/array_flags.txt"
        tasks=$((tasks + 1))
    done
    export ARRAY_FLAGS=$out/array_flags.txt MEGATRON_PRUNE_ROOT=$root
    # shellcheck disable=SC2086 # the options are words
    array=$(sbatch --parsable --array "0-$((tasks - 1))" $slurm "$root/examples/slurm/pretrain_efficientllm.sbatch" "$config" --stage "$stages")
    last=$(sbatch --parsable --nodes 1 --ntasks 1 --dependency "afterany:$array" --output "${out//%/%%}/collect.log" --wrap \
        "$(quoted "$PYTHON") $(quoted "$root/tools/token_scaling.py") --runs $(quoted "$out")/ratio_* --output-dir $(quoted "$out")")
    echo "job array $array with $tasks runs; job $last collects into $out"
else
    for ratio in $ratios; do
        echo "== ratio $ratio"
        bash "$root/examples/pretrain_efficientllm.sh" "$config" --stage "$stages" -- "$@" --prune-schedule ratio --prune-ratio "$ratio" \
            --save "$out/ratio_${ratio/:/-}"
    done
    tabulate
fi
