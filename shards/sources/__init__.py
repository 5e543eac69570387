"""Readers of the datasets people have. Each gives a Source: records, and where their images are."""

from shards.sources.class_folders import classes
from shards.sources.coco import coco, karpathy
from shards.sources.image_files import ImageFiles
from shards.sources.records import Record, Source
from shards.sources.table import table

__all__ = ["ImageFiles", "Record", "Source", "classes", "coco", "karpathy", "table"]
