"""Tests of what a rank owns of the optimizer."""
