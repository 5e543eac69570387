"""The captioner: configuration, data, model, training, scoring and prediction. Knows tensors; people meet `launch`."""

__version__ = "0.2.0"
