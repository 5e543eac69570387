"""The loss of a split's own captions under teacher forcing: what training lowers, on images it does not train on."""

import torch
import torch.nn.functional as F

from captioning.data.captions import EncodedCaptions
from captioning.data.collate import ImageBatch, pad_captions
from captioning.distributed.ranks import Ranks
from captioning.model.captioner import Captioner
from captioning.model.losses import count_in_top, perplexity


class SplitLoss:
    """Adds up over the batches of images it is given, with every caption of each image: cross-entropy, and target words
    among the ``top_k`` likeliest."""

    def __init__(self, model: Captioner, captions: EncodedCaptions, top_k: int):
        self.model, self.captions, self.top_k = model, captions, top_k
        self.total, self.in_top, self.targets = 0.0, 0, 0

    @torch.no_grad()
    def add(self, batch: ImageBatch) -> None:
        """A batch on the model's device; the model is in eval mode."""
        captions = [self.captions.of(sample) for sample in batch.samples]
        on_device = pad_captions(captions).each(lambda tensor: tensor.to(batch.inputs.device))
        logits, _ = self.model(batch.inputs, on_device, batch.valid)
        self.total += float(F.cross_entropy(logits.float(), on_device.targets, reduction="sum"))
        self.in_top += int(count_in_top(self.top_k, logits, on_device.targets))
        self.targets += len(on_device.target_index)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Per target word, over all ranks' batches: loss, perplexity, topK_accuracy."""
        total, in_top, targets = ranks.all_reduce_sum([self.total, float(self.in_top), float(self.targets)])
        loss = total / max(1.0, targets)
        accuracy = in_top / max(1.0, targets)
        return {"loss": loss, "perplexity": perplexity(loss), f"top{self.top_k}_accuracy": accuracy}
