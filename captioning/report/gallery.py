"""A folder with an HTML page of images and what a model says of them, written image by image, however many."""

import math
from pathlib import Path

from PIL import Image

from captioning.data.transforms import Preprocessing
from captioning.inference.predictor import Caption
from captioning.report.markup import escape, looks, page, smaller
from shards.files import write_atomically

_THUMBNAIL = 480  # longest side in pixels


class Gallery:
    """``add`` images, then ``close``: DIR/index.html and the thumbnails it shows in DIR/images."""

    def __init__(self, folder: Path, title: str, about: str):
        self.folder, self.title, self.about = folder, title, about
        self.cards: list[str] = []
        self.failed: list[str] = []
        (folder / "images").mkdir(parents=True, exist_ok=True)

    def add(self, name: str, image: Image.Image, caption: Caption, preprocessing: Preprocessing) -> None:
        file = f"images/{len(self.cards) + 1:05d}.jpg"
        smaller(image, _THUMBNAIL).save(self.folder / file, quality=85)
        seen = ""
        if caption.attention is not None:
            seen = file.replace(".jpg", "-seen.jpg")
            preprocessing.seen(image).save(self.folder / seen, quality=85)
        likelihood = math.exp(caption.log_probability / (len(caption.words) + 1))
        self.cards.append(
            f'<article class="card"><img loading="lazy" src="{file}" alt="{escape(caption.text)}">\n'
            f'<div class="text"><p class="said">{escape(caption.text) or "(no words)"}</p>\n'
            f'<p class="meta">{escape(name)} · log-probability {caption.log_probability:.2f}, '
            f"{likelihood:.0%} a word</p>\n{looks(seen, caption)}</div></article>"
        )

    def fail(self, message: str) -> None:
        self.failed.append(message)

    def close(self) -> Path:
        """Write the page; returns its path."""
        failed = ""
        if self.failed:
            items = "\n".join(f"<li>{escape(message)}</li>" for message in self.failed)
            failed = f"<h2>{len(self.failed):,} could not be captioned</h2>\n<ul>{items}</ul>"
        cards = "\n".join(self.cards)
        head = f'<h1>{escape(self.title)}</h1>\n<p class="soft">{escape(self.about)}</p>'
        body = f'{head}\n<p>{len(self.cards):,} images</p>\n<div class="gallery">\n{cards}\n</div>\n{failed}'
        path = self.folder / "index.html"
        write_atomically(path, page(self.title, body).encode(errors="xmlcharrefreplace"))  # names of no encoding
        return path
