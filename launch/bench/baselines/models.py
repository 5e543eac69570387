"""The model side of the field's usual captioning scripts, written plainly as they are, for comparison only.

Both take one caption as one sample, so an image with five captions passes the encoder five times, in fp32, and step a
plain Adam. ``images`` are float32 [N, 3, S, S], ``captions`` int64 [N, T] with <start> and <end>, sorted by length,
longest first, ``lengths`` a list of N numbers that counts both.
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

FIRST_FINE_TUNED = 5  # of a ResNet's children: conv1, bn1, relu, maxpool, layer1, and layer2 is the first trained


class BaselineLstm(nn.Module):
    """A frozen ResNet, Linear and BatchNorm, and an LSTM over packed sequences: Show and Tell's tutorials."""

    def __init__(self, encoder: str, vocabulary_size: int, embedding_size: int = 256, hidden_size: int = 512):
        super().__init__()
        resnet = torchvision.models.get_model(encoder, weights=None)
        self.resnet = nn.Sequential(*list(resnet.children())[:-1])
        self.linear = nn.Linear(resnet.fc.in_features, embedding_size)
        self.norm = nn.BatchNorm1d(embedding_size, momentum=0.01)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.classifier = nn.Linear(hidden_size, vocabulary_size)
        trained = (self.linear, self.norm, self.embedding, self.lstm, self.classifier)
        self.optimizer = torch.optim.Adam([p for part in trained for p in part.parameters()], lr=1e-3)

    def encode(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.resnet(images)
        return self.norm(self.linear(features.flatten(1)))

    def loss(self, images: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        targets = pack_padded_sequence(captions, lengths, batch_first=True).data
        inputs = torch.cat([self.encode(images).unsqueeze(1), self.embedding(captions)], dim=1)
        hidden = self.lstm(pack_padded_sequence(inputs, lengths, batch_first=True))[0]
        return nn.functional.cross_entropy(self.classifier(hidden.data), targets)

    @torch.no_grad()
    def caption(self, image: Tensor, max_words: int) -> list[int]:
        """Greedy words of one image [1, 3, S, S]: always ``max_words`` of them, cut at <end> afterwards."""
        inputs, state, words = self.encode(image).unsqueeze(1), None, []
        for _ in range(max_words):
            hidden, state = self.lstm(inputs, state)
            word = self.classifier(hidden.squeeze(1)).argmax(1)
            words.append(int(word))
            inputs = self.embedding(word).unsqueeze(1)
        return words


class BaselineAttention(nn.Module):
    """A ResNet fine-tuned from layer2 up and a soft-attention LSTM cell stepped word by word, as in the tutorials of
    Show, Attend and Tell (https://arxiv.org/abs/1502.03044); two Adam optimizers."""

    def __init__(self, encoder: str, vocabulary_size: int, size: int = 512):
        super().__init__()
        resnet = torchvision.models.get_model(encoder, weights=None)
        channels = resnet.fc.in_features
        self.resnet = nn.Sequential(*list(resnet.children())[:-2])
        for child in list(self.resnet.children())[:FIRST_FINE_TUNED]:
            child.requires_grad_(False)
        self.pool = nn.AdaptiveAvgPool2d((14, 14))
        self.image_attention, self.word_attention = nn.Linear(channels, size), nn.Linear(size, size)
        self.score = nn.Linear(size, 1)
        self.embedding = nn.Embedding(vocabulary_size, size)
        self.cell = nn.LSTMCell(size + channels, size, bias=True)
        self.init_h, self.init_c = nn.Linear(channels, size), nn.Linear(channels, size)
        self.gate, self.classifier = nn.Linear(size, channels), nn.Linear(size, vocabulary_size)
        self.dropout = nn.Dropout(0.5)
        fine_tuned = [p for p in self.resnet.parameters() if p.requires_grad]
        others = [p for name, p in self.named_parameters() if not name.startswith("resnet")]
        self.encoder_optimizer = torch.optim.Adam(fine_tuned, lr=1e-4)
        self.optimizer = torch.optim.Adam(others, lr=4e-4)

    def encode(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, 196, C]."""
        return self.pool(self.resnet(images)).flatten(2).transpose(1, 2)

    def attend(self, places: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        projected = torch.relu(self.image_attention(places) + self.word_attention(hidden).unsqueeze(1))
        alpha = self.score(projected).squeeze(2).softmax(dim=1)
        return (places * alpha.unsqueeze(2)).sum(dim=1), alpha

    def loss(self, images: Tensor, captions: Tensor, lengths: list[int]) -> Tensor:
        places = self.encode(images)
        hidden, cell = self.init_h(places.mean(dim=1)), self.init_c(places.mean(dim=1))
        embedded, decoded = self.embedding(captions), [length - 1 for length in lengths]
        logits = places.new_zeros(len(captions), max(decoded), self.classifier.out_features)
        alphas = places.new_zeros(len(captions), max(decoded), places.shape[1])
        for t in range(max(decoded)):
            going = sum(length > t for length in decoded)
            context, alpha = self.attend(places[:going], hidden[:going])
            context = torch.sigmoid(self.gate(hidden[:going])) * context
            inputs = torch.cat([embedded[:going, t], context], dim=1)
            hidden, cell = self.cell(inputs, (hidden[:going], cell[:going]))
            logits[:going, t] = self.classifier(self.dropout(hidden))
            alphas[:going, t] = alpha
        predicted = pack_padded_sequence(logits, decoded, batch_first=True).data
        targets = pack_padded_sequence(captions[:, 1:], decoded, batch_first=True).data
        return nn.functional.cross_entropy(predicted, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()

    @torch.no_grad()
    def caption(self, image: Tensor, max_words: int, start: int, beam_size: int = 5) -> list[int]:
        """The likeliest of ``beam_size`` beams of one image [1, 3, S, S], after ``max_words`` steps of all beams."""
        places = self.encode(image).expand(beam_size, -1, -1)
        hidden, cell = self.init_h(places.mean(dim=1)), self.init_c(places.mean(dim=1))
        words = torch.full((beam_size, 1), start, device=image.device)
        scores = torch.zeros(beam_size, 1, device=image.device)
        for t in range(max_words):
            context, _ = self.attend(places, hidden)
            context = torch.sigmoid(self.gate(hidden)) * context
            hidden, cell = self.cell(torch.cat([self.embedding(words[:, -1]), context], dim=1), (hidden, cell))
            total = scores + self.classifier(hidden).log_softmax(dim=1)
            scores, best = (total[0] if t == 0 else total.flatten()).topk(beam_size)
            row, word = best // total.shape[1], best % total.shape[1]
            words, scores = torch.cat([words[row], word.unsqueeze(1)], dim=1), scores.unsqueeze(1)
            hidden, cell = hidden[row], cell[row]
        return words[0, 1:].tolist()


Baseline = BaselineLstm | BaselineAttention


def baseline_step(model: Baseline, images: Tensor, captions: Tensor, lengths: list[int]) -> float:
    """One update as these scripts make it; returns the loss they print, which waits for the device."""
    loss = model.loss(images, captions, lengths)
    model.zero_grad()
    loss.backward()
    if isinstance(model, BaselineAttention):
        torch.nn.utils.clip_grad_value_([p for p in model.parameters() if p.grad is not None], 5.0)
        model.encoder_optimizer.step()
    model.optimizer.step()
    return loss.item()
