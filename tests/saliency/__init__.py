"""Tests of criteria, the Fisher estimate, and unit scores over all ranks."""
