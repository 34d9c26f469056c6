"""How good a model is: held-out loss, figures of tasks, a suite of the run's own text, memorization, lm-eval."""
