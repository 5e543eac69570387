"""From a model to captions, batched on the device."""

import torch
from torch import Tensor

from captioning.data.vocabulary import END, PAD, START, UNK
from captioning.model.captioner import Captioner


@torch.inference_mode()
def greedy(model: Captioner, images: Tensor, max_words: int) -> Tensor:
    """The most probable word at every step: uint8 images [B, 3, S, S] -> word ids [B, T], <pad> after <end>.

    <pad>, <start> and <unk> are never chosen. Stops when every caption has ended, after ``max_words`` at the latest.
    """
    state = model.decoder.start(model.encode(images))
    words = torch.full((len(images),), START, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    chosen = []
    for _ in range(max_words):
        logits, state = model.decoder.step(state, words)
        logits[:, [PAD, START, UNK]] = -torch.inf
        words = logits.argmax(dim=-1).masked_fill(ended, PAD)
        chosen.append(words)
        ended = ended | (words == END)
        if bool(ended.all()):
            break
    return torch.stack(chosen, dim=1)
