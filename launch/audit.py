"""What splits share: ids, bytes, near duplicates (encoded again, resized, mirrored, slightly cropped).

The first split is the one trained on; every other one is compared with it. Packing stores hashes of each image, so no
image is read but for the page. The exit status is 0 whatever is shared.
"""

import argparse
import json
from typing import Any

from launch.cli.command import command_parser, output_file, output_folder, run
from shards import index as shard_index
from shards.index import Index
from shards.overlap import Overlap, overlap


def main() -> None:
    arguments = parser().parse_args()
    train = shard_index.load(arguments.train)
    results, comparisons = [], []
    for place in arguments.others:
        other = shard_index.load(place)
        shared = overlap(train, other)
        _tell(shared)
        comparisons.append((other, shared))
        results.append({**shared.numbers(), "pairs": _named(train, other, shared)})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    if arguments.html:
        from captioning.report.pairs import write_pairs

        print(f"page: {write_pairs(arguments.html, train, comparisons, arguments.most)}")


def _tell(shared: Overlap) -> None:
    print(f"{shared}. {shared.same:,} are images of {shared.train}.")
    if shared.shared_bytes is None:
        print("  bytes were not compared: a split has no hashes; pack it again")
    if shared.near_duplicates is None:
        print("  pictures were not compared: a split has no perceptual hashes; pack it again, tars with --check-images")
    for difference in shared.packing_differs:
        print(f"  packed otherwise: {difference}")


def _named(train: Index, other: Index, shared: Overlap) -> list[dict[str, Any]]:
    """The pairs by their samples' keys."""
    if not shared.pairs:
        return []
    ours, theirs = train.texts(), other.texts()
    return [
        {"train": ours[pair.train].key, "val": theirs[pair.val].key, "why": pair.why, "bits": pair.bits}
        for pair in shared.pairs
    ]


def parser() -> argparse.ArgumentParser:
    parser = command_parser("audit", __doc__)
    parser.add_argument("train", metavar="TRAIN.json", help="the split that is trained on: a path or a URL")
    parser.add_argument("others", nargs="+", metavar="VAL.json", help="splits compared with it")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="the numbers, and every pair by its keys")
    parser.add_argument("--html", type=output_folder, metavar="DIR", help="a page of the pairs, side by side")
    parser.add_argument("--most", type=int, default=200, metavar="N", help="pairs on the page, the nearest first (200)")
    return parser


if __name__ == "__main__":
    run(main)
