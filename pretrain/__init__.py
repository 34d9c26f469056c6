"""Raw text to a trained language model: Hydra configs, DeepSpeed ZeRO, exact WebDataset streams."""

__version__ = "0.1.0"
