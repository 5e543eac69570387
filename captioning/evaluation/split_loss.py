"""The loss of a split's own captions under teacher forcing: what training lowers, on images it does not train on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.data.captions import EncodedCaptions
from captioning.data.collate import pad_captions
from captioning.distributed.ranks import Ranks
from captioning.evaluation.caption_split import EncodedImages
from captioning.model.captioner import Captioner
from captioning.model.losses import count_in_top, perplexity


class SplitLoss:
    """Adds up over the images it is given, with every caption of each: cross-entropy, and target words among the
    ``top_k`` likeliest. The sums stay on the device until ``means``."""

    def __init__(self, model: Captioner, captions: EncodedCaptions, top_k: int):
        self.model, self.captions, self.top_k = model, captions, top_k
        self.total: Tensor | float = 0.0
        self.in_top: Tensor | int = 0
        self.targets = 0

    @torch.no_grad()
    def add(self, images: EncodedImages) -> None:
        """Images encoded by the model, which is in eval mode."""
        captions = pad_captions([self.captions.of(sample) for sample in images.samples])
        if not len(captions):
            return
        on_device = captions.each(lambda tensor: tensor.to(images.features.device))
        logits, _ = self.model.decoder(images.features, on_device)
        self.total = self.total + F.cross_entropy(logits.float(), on_device.targets, reduction="sum").double()
        self.in_top = self.in_top + count_in_top(self.top_k, logits, on_device.targets)
        self.targets += len(on_device.target_index)

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Per target word, over all ranks' batches: loss, perplexity, topK_accuracy."""
        total, in_top, targets = ranks.all_reduce_sum([float(self.total), float(self.in_top), float(self.targets)])
        loss = total / max(1.0, targets)
        accuracy = in_top / max(1.0, targets)
        return {"loss": loss, "perplexity": perplexity(loss), f"top{self.top_k}_accuracy": accuracy}
