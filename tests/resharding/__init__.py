"""Tests of plans, removals and compactions; `live_run` is the small run on real ranks that they look into."""
