"""What can shrink, and how it is laid out.

shape          LlamaShape: the source model
kinds          kinds of units: heads, channels, ...
table          every parameter: its role, and what each of its dims counts
families       which parameters the models of a family have
architecture   which units are alive: widths, the count of parameters, groups
layout         which slot of which rank holds them
llama, layers  the model on megatron-core, exact while slots are empty
sources        random initial weights
first_format   files from before kinds had names
"""
