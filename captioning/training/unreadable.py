"""Unreadable samples: reported when they are met, fatal when there are too many."""

from captioning.config import Config
from captioning.data.collate import CaptionBatch
from captioning.distributed.ranks import Ranks
from captioning.training.monitor import Monitor
from shards.errors import InputError, listed


def report_unreadable(
    micro_batches: list[CaptionBatch], so_far: int, samples: int, config: Config, ranks: Ranks, monitor: Monitor
) -> None:
    """Report the unreadable samples of a step, on whichever rank they are. Called on every rank.

    Raises:
        InputError: when ``so_far`` of the epoch's ``samples`` are more than ``data.max_unreadable_fraction`` allows.
    """
    parts = ranks.all_gather([str(sample) for batch in micro_batches for sample in batch.unreadable])
    listing = listed(sample for part in parts for sample in part)
    monitor.say(f"unreadable, left out of step {micro_batches[0].step + 1}:\n{listing}")
    if so_far > config.data.max_unreadable_fraction * samples:
        raise InputError(
            f"{so_far} of {samples} samples unreadable in epoch {micro_batches[0].epoch}: more than "
            f"data.max_unreadable_fraction={config.data.max_unreadable_fraction} allows. The last:\n{listing}\n"
            "Check the shards with `captioning pack verify`, pack again, or raise data.max_unreadable_fraction."
        )
