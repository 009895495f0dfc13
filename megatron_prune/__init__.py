"""megatron_prune: prune a Llama while it keeps training, on megatron-core.

The rooms, in the order in which data flows (none imports a later one):

    config       what to run: frozen dataclasses, strict YAML, Megatron's flag names
    runtime      the device and the process groups: CUDA/NCCL or CPU/gloo
    model        what can shrink: kinds of units, Architecture, ShardLayout, the table of parameters, layers
    optimizer    megatron-core's DDP and optimizer, and a view of what each rank owns
    resharding   the live model: groups retire and shards are compacted on every rank
    saliency     what a unit costs: criteria, Fisher, group scores, sharded reducer
    pruning      which group, when: kinds of groups, selector, schedule, history
    data         tokenizers, preprocessing, blends
    checkpoint   live units only, loadable on any layout
    training     the loop
    huggingface  Hugging Face folders in and out
    evaluation   perplexity, zero-shot tasks
    report       a run, or several side by side, as one HTML page
    launch       a configuration becomes a running job
    testing      gloo ranks on CPU and the dense oracle
    commands     what `megatron-prune COMMAND` runs
"""

__version__ = "0.1.0"
