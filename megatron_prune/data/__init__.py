"""From text to micro-batches: tokenizers, preprocessing, indexed data sets and their blends.

    tokenizer.py   SentencePiece models and Hugging Face tokenizers behind one small interface
    hub_files.py   small files of a Hugging Face folder: JSON, Git LFS pointers, hub caches
    documents.py   text and JSON-lines files, packed or not -> documents, with file and line for every mistake
    preprocess.py  documents -> token ids -> `P.bin`, `P.idx` and `P.json`, with any number of processes
    leftovers.py   temporary files that tell whether somebody still writes them
    indexed.py     what stands in these three files, and whether they are whole
    index_cache.py the shuffled indices on disk: checked, made again where they are not whole
    guarded.py     megatron-core's classes, safe against damaged and shrinking files and foreign ids
    datasets.py    --data-path -> `Blend` -> megatron-core's GPT data sets
    batches.py     a data set -> `BatchStream` of micro-batches

Import from the modules: this package imports none of them, so that a preprocessing worker never loads torch.
"""
