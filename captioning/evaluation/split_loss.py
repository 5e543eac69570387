"""The loss of a split's own captions under teacher forcing: what training lowers, on images it does not train on."""

import torch
import torch.nn.functional as F

from captioning.data.captions import EncodedCaptions
from captioning.data.collate import ImageBatch, pad_captions
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner


class SplitLoss:
    """Adds up cross-entropy over the batches of images it is given, with every caption of each image."""

    def __init__(self, model: Captioner, captions: EncodedCaptions):
        self.model, self.captions = model, captions
        self.total, self.targets = 0.0, 0

    @torch.no_grad()
    def add(self, batch: ImageBatch) -> None:
        """A batch on the model's device; the model is in eval mode."""
        captions = [self.captions.of(sample) for sample in batch.samples]
        on_device = pad_captions(captions).each(lambda tensor: tensor.to(batch.inputs.device))
        logits, _ = self.model(batch.inputs, on_device, batch.valid)
        self.total += float(F.cross_entropy(logits.float(), on_device.targets, reduction="sum"))
        self.targets += len(on_device.target_index)

    def mean(self, ranks: Ranks) -> float:
        """Per target word, over all ranks' batches."""
        total, targets = ranks.all_reduce_sum([self.total, float(self.targets)])
        return total / max(1.0, targets)
