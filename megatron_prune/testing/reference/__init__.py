"""The dense oracle: what pruning-aware pretraining computes, without a word about how it is distributed.

A model keeps training; at some iterations one *group* of units (a head or an FFN channel of every layer, or one channel
of the residual stream) is cut out for good: the one whose loss, by a second-order estimate from weights, gradients and
Fisher information, costs least. Read in this order:

    oracle                DenseOracle: one iteration from batch to removal
    oracle_scores         criteria, unit scores, and the choice of a group
    oracle_geometry       which dims of which Hugging Face tensor belong to which units; counting and slicing
    oracle_model          the forward pass of a Llama whose layers differ in their heads
    oracle_second_order   how survivors take over before a group leaves
    oracle_settings       what a run depends on

It imports no other room (errors apart), so that it cannot share their mistakes.
"""
