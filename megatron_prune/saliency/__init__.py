"""What a unit costs: element-wise criteria (`criteria`), the statistics they need (`inputs`, `hessian`, and with the
Fisher estimate `collector`, which gathers them), sums per unit over all ranks (`reducer`), those as plain arrays
(`scores`), and as pictures (`plots`)."""
