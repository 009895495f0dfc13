#!/usr/bin/env bash
# The whole way, from nothing to a small model: corpus, tokenizer, a pretrained source, pruned to half while it trains,
# exported, reloaded by stock transformers. Under 10 minutes on two CPU cores; needs only what `make install` sets up.
#
#   make demo        or        bash examples/demo.sh        (from a Python environment with megatron_prune[hf,plot])
#
# Everything is written to build/demo, which is emptied first. The table at the end is also in build/demo/results.md.
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

OUT=build/demo
STEPS=7
RANKS=2
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
# One thread per process; megatron-core's remarks on absent accelerators are no news here; nothing is looked up on a hub.
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

step=0
title="start"
step() {
    step=$((step + 1))
    title="$*"
    printf '\n[%d/%d, %d:%02d] %s\n' "$step" "$STEPS" $((SECONDS / 60)) $((SECONDS % 60)) "$title"
}
trap 'echo "demo: stopped in step $step of $STEPS ($title); the reason is in the lines above" >&2' ERR
trap 'echo "demo: interrupted in step $step of $STEPS ($title)" >&2; exit 130' INT TERM
torchrun() { python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" "$@"; }

python - torch megatron sentencepiece transformers <<'EOF'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"demo: not installed: {', '.join(missing)}; run make install, or make demo")
EOF

rm -rf "$OUT"
mkdir -p "$OUT"

step "build a corpus out of Python's own reference texts, docstrings and sources"
python examples/demo/build_corpus.py --output $OUT/corpus.jsonl --megabytes 6

step "train a SentencePiece tokenizer on it, and turn the corpus into token ids"
python examples/demo/train_tokenizer.py --corpus $OUT/corpus.jsonl --output $OUT/tokenizer.model --vocab-size 2048
python tools/preprocess_data.py --input $OUT/corpus.jsonl --output-prefix $OUT/corpus \
    --tokenizer-model $OUT/tokenizer.model --append-eod

step "pretrain the source: $RANKS processes, data parallel, sharded optimizer"
torchrun -m megatron_prune.pretrain --config examples/demo/pretrain.yaml

step "export the source to Hugging Face's format"
python tools/convert_to_hf.py --load $OUT/source --save $OUT/source_hf

step "prune it to half while it trains, and train on: $RANKS processes, tensor and sequence parallel"
torchrun -m megatron_prune.pretrain --config examples/demo/prune.yaml

step "export the small model, and compare it with stock transformers' computation"
python tools/convert_to_hf.py --load $OUT/pruned --save $OUT/pruned_hf --verify

step "reload it with stock transformers, and sum up"
python examples/demo/report.py --folder $OUT --seconds $SECONDS
