"""Tests of the choice of a group, the schedule, the history, and steps that are not finite."""
