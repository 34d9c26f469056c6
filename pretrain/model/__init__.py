"""The Transformer, its parts, heads and losses."""
