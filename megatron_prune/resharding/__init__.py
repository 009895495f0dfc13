"""Units leave a model in training, on every rank.

live          LiveModel: the wrapped model and its layout, `retire` (zero a group, exactly) and `compact`
plan          how old local tensors become new ones (pure);  compact  carries it out
coordinator   agree on a decision, commit it, compact when due, and check all that
"""
