#!/usr/bin/env bash
# The paper's data: FineWeb-Edu 220 B, Cosmopedia v2 28 B, Python-Edu 4 B and OpenWebMath 27.5 B tokens, downloaded and
# turned into the data sets that the recipes in examples/configs name (data/fineweb_edu, ...), document by document.
#
#   bash examples/prepare_data.sh --tokenizer-model SmolLM-1.7B                        # all four, into data/
#   bash examples/prepare_data.sh --tokenizer-model SmolLM-1.7B --corpora open_web_math --workers 32
#   bash examples/prepare_data.sh --tokenizer-model SmolLM-1.7B --tokens 0.01         # a hundredth, to try things out
#   bash examples/prepare_data.sh --tokenizer-model SmolLM-1.7B --dry-run              # only says what it would do
#   bash examples/prepare_data.sh --tokenizer-model M --raw texts --no-download        # from files that are there
#
# What a corpus needs: about 6 bytes of disk per token for its text and 2 for its ids; 280 B tokens are some 2.2 TB. Parts
# that are done are skipped, so the same command goes on after an interruption. Needs `pip install datasets` to download;
# HF_TOKEN is passed on by it where a corpus asks for an account. Licences are the publishers': read them before you train.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# name, repository, configuration (- for none), where a record holds its text, billions of tokens in the paper's run
table() {
    cat <<'TABLE'
fineweb_edu    HuggingFaceTB/smollm-corpus  fineweb-edu-dedup  text  220
cosmopedia_v2  HuggingFaceTB/smollm-corpus  cosmopedia-v2      text  28
python_edu     HuggingFaceTB/smollm-corpus  python-edu         text  4
open_web_math  open-web-math/open-web-math  -                  text  27.5
TABLE
}

fail() {
    printf 'error: %s\n' "${*//[[:cntrl:]]/?}" >&2 # a terminal would obey them
    exit 2
}
tokenizer="" corpora=$(table | awk '{print $1}') output=data raw="" workers=8 share=1 dry="" download=yes
while [ $# -gt 0 ]; do
    case $1 in
    --tokenizer-model) tokenizer=${2:?--tokenizer-model needs a folder or file} && shift 2 ;;
    --corpora) corpora=${2:?--corpora needs names} && shift 2 ;;
    --output) output=${2:?--output needs a folder} && shift 2 ;;
    --raw) raw=${2:?--raw needs a folder} && shift 2 ;;
    --workers) workers=${2:?--workers needs a number} && shift 2 ;;
    --tokens) share=${2:?--tokens needs a share of the corpora, 1 for all} && shift 2 ;;
    --dry-run) dry=yes && shift ;;
    --no-download) download="" && shift ;;
    *) fail "unknown option $1; the head of $0 lists them" ;;
    esac
done
[ -n "$tokenizer" ] || fail "--tokenizer-model is not set: name the source model's folder; ids must be that model's"
[ -e "$tokenizer" ] || [ -n "$dry" ] || fail "--tokenizer-model $tokenizer: no such file or folder"
for word in "$tokenizer" "$output" "$raw" "$share" "$root"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "names must be free of line ends and other control characters: $(printf %q "$word")"
done
[[ $output != -* ]] || output=./$output
raw=${raw:-$output/raw}
[[ $raw != -* ]] || raw=./$raw

for name in $corpora; do
    read -r _ repository configuration key billions < <(table | awk -v name="$name" '$1 == name') \
        || fail "--corpora: unknown corpus $name; there are $(table | awk '{print $1}' | paste -sd' ')"
    text=$raw/$name.jsonl.gz
    echo "== $name: $repository ($configuration), $(awk -v b="$billions" -v s="$share" 'BEGIN {print b * s}') B tokens -> $output/$name"
    fetch=("$PYTHON" "$root/examples/fetch_corpus.py" --repository "$repository" --configuration "$configuration" --key "$key"
        --billions "$billions" --share "$share" --output "$text")
    encode=("$PYTHON" "$root/tools/preprocess_data.py" --input "$text" --output-prefix "$output/$name"
        --tokenizer-model "$tokenizer" --append-eod --workers "$workers")
    if [ -f "$output/$name.json" ]; then
        echo "   $output/$name is done, skipped"
        continue
    fi
    if [ ! -f "$text" ] && [ -z "$download" ]; then
        fail "$text: no such file, and --no-download"
    fi
    if [ -n "$dry" ]; then
        [ -f "$text" ] || echo "   would run:$(printf ' %q' "${fetch[@]}")"
        echo "   would run:$(printf ' %q' "${encode[@]}")"
        continue
    fi
    mkdir -p "$raw" "$output"
    [ -f "$text" ] || "${fetch[@]}"
    "${encode[@]}"
done
