"""The launcher of whole jobs: train, convert, evaluate, and again after failures.

request     what a job is asked to do;  job  one node's part of it
stages      what is done, what is to be done
after       export and evaluation, when training is over
supervisor  processes of a stage, signals passed on
elastic     torchrun with the launcher's own marks
"""
