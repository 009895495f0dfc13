"""Tests of the loop, and of the sharded system against the dense oracle."""
