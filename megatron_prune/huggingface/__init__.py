"""Hugging Face folders in and out: weights, configuration and tokenizer of a model, in the form stock tools load.

    config           config.json: read into a LlamaShape, written for an Architecture
    source_facts     what else a source says
    weights          a folder's tensors, one in memory at a time, all accounted for
    export           weights, config, generation config, tokenizer and model card into a folder
    kv_policy        how KV heads are stored, given that stock classes know one number of them
    cluster          exports that bring their code (remote/) and can be imported and pruned again
    shards           safetensors files written tensor by tensor
    model_card       README.md;  provenance  what a checkpoint tells about the run, for it
    tokenizer_export tokenizer files that give the ids trained with (from SentencePiece: sentencepiece_*)
    gguf_file        a folder as one GGUF file for llama.cpp, its tokenizer by gguf_tokenizer
    gguf_import      a GGUF file as a folder, its tokenizer by gguf_vocabulary
    verify_export    logits of the export and of the training model

Whatever is written here loads with plain `transformers`, with no code of its own unless that is asked for, and gives
what training gave: the same logits from the same weights, the same ids from the same text. What that form cannot say
exactly is refused, naming the option, rather than written inexactly.
"""
