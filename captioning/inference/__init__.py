"""A trained model in use: Predictor, export, import of other checkpoints, what it costs."""
