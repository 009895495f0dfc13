"""Tests of architectures, layouts and the table of parameter axes; `random_models` draws them for all rooms."""
