"""How good is a model? Measured on Hugging Face folders, so that what is judged is what others will load.

    models        a folder, or a checkpoint exported into a temporary one -> `ModelFolder`; its model and its tokenizer
    corpora       text files and .bin/.idx data sets -> windows of tokens and their successors
    perplexity    a model over such windows: loss, perplexity, bits per byte, perplexity per word
    tasks         the paper's eight zero-shot tasks, from the network or from local files
    zero_shot     a model on them, by lm-evaluation-harness
    side_by_side  several models side by side, as Markdown and as JSON

`megatron-prune evaluate` is the command. Nothing here scores a task by itself: the harness's own task definitions and
its own `hf` model do, so that numbers can be held against published ones.
"""
