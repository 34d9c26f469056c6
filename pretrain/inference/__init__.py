"""What a model is used for: writing text, and searching among vectors."""
