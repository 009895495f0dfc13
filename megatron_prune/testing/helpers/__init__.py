"""What tests are made of.

ranks         run_ranks: a function on N gloo ranks, results back, nothing left behind
tiny_models   tiny configurations, random weights, Hugging Face folders;  tiny_runs  their data and configurations
sharded       the sharded system trained on a few ranks;  oracle_cases  the cases;  comparison  against the oracle
stepped_run, meters, warm   parts of an iteration, one at a time, and what they cost
"""
