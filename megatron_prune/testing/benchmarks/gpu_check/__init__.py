"""First thing to run where a GPU is at hand: does it compute the same, how fast, in how much memory.

    rows         a row (goal, measured, verdict), the file rows go to at once, the table of all of them
    runner       steps in processes of their own, each with a budget of seconds; a failure never stops the next
    smoke        device, NCCL, a tiny prune against the CPU's
    cover        the oracle's single-rank cases on the device, fp32 and bf16; `pytest -m gpu`
    speed        1.7 B parameters: plain, pruning, a removal, a compaction, odd widths, the targets' shapes, attention
    memory       peaks, a save beside the training, the dry run's estimate
    way          from a source to an export by the commands users type, with a change of device in mid-pruning
    shared       two ranks on one card over gloo, as far as its operations exist
    science      a real model pruned to half on the tokens that the time allows, resumable
    new_cluster  many nodes: bandwidth of NCCL, a tiny prune on the real layout against the oracle's losses

`megatron-prune gpu-check` is the command; with `--device cpu --tiny` the same code runs anywhere in a minute or two,
and its numbers mean nothing.
"""
