"""Measurements that take longer than a test.

costs         time, bytes and dispatches of removals and compactions
kills, soak   runs killed at random moments, and that they lose nothing
gpu_check/    the first thing to run where a GPU is at hand
"""
