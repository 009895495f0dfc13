"""What a unit costs: element-wise criteria (`criteria`), the statistics they need (`fisher`, `inputs`, `hessian`,
gathered by `collector`), sums per unit over all ranks (`reducer`), those as plain arrays (`scores`), and as pictures
(`plots`)."""
