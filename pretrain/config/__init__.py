"""A run's configuration: the frozen dataclasses, Hydra's composition of them, and the checks before anything starts."""
