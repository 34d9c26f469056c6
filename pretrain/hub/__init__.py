"""Hugging Face, both ways, with the proof that nothing changed on the way."""
