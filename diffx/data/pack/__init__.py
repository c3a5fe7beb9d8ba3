"""Packing: images of any kind into tar shards of WebDataset's layout, with a manifest."""

from diffx.data.pack.arrays import ArraySource, ImagesSource, data_splits
from diffx.data.pack.files import FolderSource
from diffx.data.pack.find import splits_of
from diffx.data.pack.manifest import Manifest
from diffx.data.pack.pack import Interrupted, Layout, pack
from diffx.data.pack.parquet import ParquetSource
from diffx.data.pack.source import PackSource, Sample
from diffx.data.pack.tars import ShardSource
from diffx.data.pack.transform import Transform

__all__ = [
    "ArraySource",
    "FolderSource",
    "ImagesSource",
    "Interrupted",
    "Layout",
    "Manifest",
    "PackSource",
    "ParquetSource",
    "Sample",
    "ShardSource",
    "Transform",
    "data_splits",
    "pack",
    "splits_of",
]
