"""Micro-batches to the device, the next one while it computes on the one before."""

import torch
from torch import Tensor

from captioning.data.collate import CaptionBatch


class DeviceCopies:
    """``begin`` a micro-batch's copy early, ``take`` it when it is needed. On a CPU there is nothing to copy.

    A GPU copies on a stream of its own, out of pinned memory, beside its kernels; one micro-batch ahead at most, so
    that a step of many needs no room for all of them.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[CaptionBatch, CaptionBatch] | None = None  # as it came, and on the device

    def begin(self, batch: CaptionBatch) -> None:
        """Copy it beside what the device computes now."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._begun = batch, batch.to(self._device)

    def take(self, batch: CaptionBatch) -> CaptionBatch:
        """The micro-batch on the device, for what it is given to compute from now on."""
        begun, self._begun = self._begun, None
        if self._stream is None or begun is None or begun[0] is not batch:
            return batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)

        def used(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(computing)  # its memory is the copying stream's, which would have it back too soon
            return tensor

        return begun[1].each(used)
