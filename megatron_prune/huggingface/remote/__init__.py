"""Code that travels with an exported model (`--kv-policy cluster`), for `trust_remote_code=True`.

    configuration_cluster_llama   the configuration class
    modeling_cluster_llama        the model class

These files are copied into the exported folder and run there with torch and transformers (4.48 to 5) alone: they import
nothing of megatron_prune, and nothing of megatron_prune imports them.
"""
