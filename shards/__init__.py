"""Datasets as WebDataset tar shards: packing, indexing, the order of an epoch, reading. Knows bytes, not tensors."""
