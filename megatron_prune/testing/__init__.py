"""Public helpers for tests: gloo ranks on CPU, and the dense oracle that the sharded system is compared with.

    ranks            run_ranks: a function on N gloo ranks, results back, nothing left behind
    oracle           DenseOracle: the whole method, dense and single-process (train, score, decide, remove)
    oracle_geometry  which dims of which Hugging Face tensor belong to which units; counting and slicing
    oracle_model     the forward pass of a Llama whose layers differ in their heads
    oracle_scores    criteria, unit scores, and the choice of a group
    tiny_models      tiny configurations, random weights, Hugging Face folders

The oracle imports no other room (errors apart), so that it cannot share their mistakes.
"""
