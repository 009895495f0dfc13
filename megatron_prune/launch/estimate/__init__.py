"""What a run will cost, from its configuration alone: pure functions, no torch, no processes.

    placement    how many copies, which layers on which pipeline stage, micro-batches
    rank_memory  bytes of the fullest rank, by kind
    activations  what a forward pass leaves for the backward pass
    route        which groups leave on the way to the target, and when: widths, iterations, tokens, FLOPs
    traffic      bytes that a rank sends per iteration, by kind

`launch.estimate.dry_run` puts them together and `launch.estimate.report` prints them.
"""
