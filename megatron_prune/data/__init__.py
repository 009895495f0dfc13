"""From text to micro-batches: tokenizers, preprocessing, indexed data sets and their blends.

    tokenizer.py   SentencePiece models and Hugging Face tokenizers behind one small interface
    documents.py   text and JSON-lines files, gzipped or not -> documents, with file and line for every mistake
    preprocess.py  documents -> token ids -> `P.bin`, `P.idx` and `P.json`, with any number of processes
    indexed.py     what stands in these three files, and whether they are whole
    datasets.py    --data-path -> `Blend` -> megatron-core's GPT data sets -> `BatchStream` of micro-batches

Import from the modules: this package imports none of them, so that a preprocessing worker never loads torch.
"""
