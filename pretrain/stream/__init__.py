"""The order of the samples, a pure function, and the exact, rank-independent batches that follow from it."""
