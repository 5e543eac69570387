"""The splits of a config, opened: their indexes, and the cache for those that are remote. No tensors yet."""

import logging
import math
import os
from pathlib import Path

from captioning.config import Config
from shards import index as shard_index
from shards import storage
from shards.errors import InputError, brief
from shards.index import Index
from shards.storage import outages
from shards.storage.cache import Cache, default_folder

logger = logging.getLogger(__name__)


def open_split(path: str, config: Config) -> Index:
    """A split's index, its shards checked as far as sizes tell, with the config's cache for remote ones; warns of a
    cache that is too small for them.

    Raises:
        InputError: when the index is missing or its shards do not fit it.
    """
    index = check_split(path, config)
    fetched = sum(shard.filesize for shard in index.shards if storage.needs_cache(shard.path))
    if fetched > index.cache.limit and os.environ.get("RANK", "0") == "0":
        logger.warning(
            f"{index.path} has {fetched / 1e9:.1f} GB and data.cache_gb={config.data.cache_gb:g}: an epoch "
            "reads from most shards at any time, so they will be fetched again and again. Raise it, or use http(s)://."
        )
    return index


def saved_split(path: str | None) -> str | None:
    """A split that a run's own config names, unless that is a command: the run may come from anybody.

    Raises:
        InputError: for a ``pipe:`` command.
    """
    if path and path.startswith("pipe:"):
        raise InputError(
            f"The run's config names a command, {brief(path)}, which is run only where you give it yourself: "
            "evaluate --split 'pipe:...'"
        )
    return path


def check_split(path: str, config: Config) -> Index:
    """As ``open_split``, without its warning."""
    outages.set_patience(min(config.data.storage_patience_seconds, config.train.hang_seconds or math.inf))
    index = shard_index.load(path, cache_of(config), config.data.trust_urls)
    index.check_files()
    return index


def cache_of(config: Config) -> Cache:
    """Where a config keeps remote shards that are not read by offset."""
    folder = Path(config.data.cache_dir).absolute() if config.data.cache_dir else default_folder()
    return Cache(folder, int(config.data.cache_gb * 1e9))
