"""For tests and measurements, in three parts:

reference   the dense oracle: the method itself, in plain torch, for one process; read it first
helpers     gloo ranks on CPU, tiny models and runs, sharded runs to compare with the oracle
benchmarks  what a removal, a compaction and a save cost; kills; the first look at a GPU
"""
