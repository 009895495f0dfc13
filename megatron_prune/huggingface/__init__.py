"""Hugging Face folders in and out: weights, configuration and tokenizer of a model, in the form stock tools load.

Whatever is written here loads with plain `transformers` and no code of its own, and gives what training gave: the same
logits from the same weights, the same ids from the same text. What that form cannot say exactly is refused, naming the
option, rather than written inexactly.
"""
