"""What the benchmarks share: rows, clocks, work counts, checks of a sampler, and the report."""
