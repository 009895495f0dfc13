"""Tests of megatron_prune; tests/<room> mirrors megatron_prune/<room>."""
