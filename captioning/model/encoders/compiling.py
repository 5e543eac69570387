"""torch.compile, stage by stage: an encoder's frozen and trained stages, and equal blocks, are graphs of their own."""

from typing import Any

from captioning.model.encoders.protocol import Encoder

_GRAPHS_PER_STAGE = 8  # dynamo's default limit for a function: training, validation, and a few batch sizes of each


def compile_stages(encoder: Encoder, **options: Any) -> None:
    """Compile each stage in place, so that its parameters keep their names; ``options`` are torch.compile's.

    dynamo counts the graphs of all stages together, since they share a wrapper. Left at its default, the limit is
    reached after two graphs of each of four stages, and from then on some run uncompiled.
    """
    import torch._dynamo  # takes a second to import, for this alone

    limits = torch._dynamo.config
    limits.cache_size_limit = max(limits.cache_size_limit, _GRAPHS_PER_STAGE * len(encoder.stages))
    for stage in encoder.stages.values():
        stage.compile(**options)
