"""The captioner: configuration, data, model, training, scoring and prediction. Knows tensors; people meet `launch`."""
