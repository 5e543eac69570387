"""Readers of the datasets people have. Each gives a Source: records, and where their images are."""

from shards.sources.class_folders import Classes, classes
from shards.sources.coco import Coco, Karpathy, coco, karpathy
from shards.sources.drawn import Scenes
from shards.sources.features import Features
from shards.sources.image_files import ImageFiles
from shards.sources.kind import Kind
from shards.sources.records import Record, Source
from shards.sources.splits import divide
from shards.sources.table import Table, table, table_splits

# What `pack NAME` reads: a new kind is a file in this folder and a line here.
KINDS: tuple[Kind, ...] = (
    Coco(),
    Karpathy(),
    Table(),
    Classes(),
    Scenes(),
    Features(),
)

__all__ = ["KINDS", "ImageFiles", "Kind", "Record", "Source", "classes", "coco", "divide", "karpathy", "table"]
__all__ += ["table_splits"]
