"""How many graphs torch.compile keeps: what it does not keep runs uncompiled, without a word."""

_GRAPHS_PER_STAGE = 8  # training, validation, and what an epoch's last step adds where a stage's BatchNorm is trained


def keep_graphs_of(stages: int) -> None:
    """Raise torch.compile's limit. It counts the graphs of all stages together, since they share a wrapper: at its
    default, two graphs of each of four stages reach it."""
    import torch._dynamo  # takes a second to import, for this alone

    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, _GRAPHS_PER_STAGE * stages)
