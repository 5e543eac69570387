"""A page of the images that two splits share, side by side."""

from collections.abc import Sequence
from pathlib import Path

from captioning.report.markup import data_url, escape, page, smaller, table
from shards.files import write_atomically
from shards.images import UnreadableImageError, open_rgb
from shards.index import Index
from shards.overlap import Overlap, Pair
from shards.reader import UnreadableSample, read_sample

_THUMBNAIL = 240  # longest side in pixels


def write_pairs(folder: Path, train: Index, compared: Sequence[tuple[Index, Overlap]], most: int) -> Path:
    """Write DIR/index.html: the numbers of each comparison and its ``most`` nearest pairs. Returns its path."""
    body = [f"<h1>What {escape(train.name)} shares with other splits</h1>"]
    for other, shared in compared:
        body.append(f"<h2>{escape(shared.val)}</h2>\n<p>{escape(str(shared))}.</p>")
        if shared.packing_differs:
            body.append(f"<p>Packed otherwise: {escape('; '.join(shared.packing_differs))}.</p>")
        pairs = sorted(shared.pairs, key=lambda pair: pair.bits)[:most]
        if pairs:
            rows = [_row(train, other, pair) for pair in pairs]
            body.append(table((escape(shared.val), escape(shared.train), "why", "bits that differ"), rows, (3,)))
        if len(shared.pairs) > len(pairs):
            body.append(f"<p>... and {len(shared.pairs) - len(pairs):,} more.</p>")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    write_atomically(path, page(f"What {train.name} shares", "\n".join(body)).encode(errors="xmlcharrefreplace"))
    return path


def _row(train: Index, other: Index, pair: Pair) -> tuple[str, ...]:
    return _shown(other, pair.val), _shown(train, pair.train), escape(pair.why), str(pair.bits)


def _shown(index: Index, number: int) -> str:
    sample = read_sample(index, number)
    if isinstance(sample, UnreadableSample):
        return escape(str(sample))
    about = f"<br><small>{escape(sample.key)}<br>{escape(sample.captions[0])}</small>"
    try:
        url = data_url(smaller(open_rgb(sample.image_bytes), _THUMBNAIL), quality=85)
    except UnreadableImageError as error:
        return escape(str(error)) + about
    return f'<img alt="{escape(sample.key)}" src="{url}">{about}'
