"""Text on disk to exact, rank-independent batches of token windows."""
