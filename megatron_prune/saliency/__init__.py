"""What a unit costs: element-wise criteria (`criteria`), the Fisher estimate (`fisher`), sums per unit over all ranks
(`reducer`), those sums as plain arrays (`scores`), and as pictures (`plots`)."""
