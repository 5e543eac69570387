"""The curves of self-critical training: what says that it works, and the ways in which it goes wrong."""

from collections.abc import Mapping

from captioning.report.charts import Points, chart

_GOING_WRONG = {
    "distinct": "train/distinct_fraction",
    "bad ending": "train/bad_ending_fraction",
    "repetition": "train/repetition_fraction",
    "cut": "train/cut_fraction",
}


def reward_charts(curves: Mapping[str, Points]) -> list[str]:
    """Charts from a run's scalars by tag; none of a run without rewards."""
    if not curves.get("train/reward"):
        return []

    def of(tags: dict[str, str]) -> dict[str, Points]:
        return {name: curves.get(tag, []) for name, tag in tags.items()}

    return [
        chart("Reward", of({"samples": "train/reward", "baseline": "train/baseline"}), "training"),
        chart("Advantage", of({"size": "train/advantage"}), "how far rewards are from their baseline"),
        chart("Caption length", of({"words": "train/caption_length"}), "words of a sample"),
        chart("Samples", of(_GOING_WRONG), "shares of all; see SELF_CRITICAL.md"),
    ]
