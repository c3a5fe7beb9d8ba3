"""Training data in WebDataset tar shards: indexed once, read at any place, in an order that depends on (seed, n)."""

from diffx.data.shards.images import ShardImages
from diffx.data.shards.index import ShardIndex, index_shard, load_index, open_index, save_index
from diffx.data.shards.source import WebDataset
from diffx.data.shards.stream import ShardStream

__all__ = [
    "ShardImages",
    "ShardIndex",
    "ShardStream",
    "WebDataset",
    "index_shard",
    "load_index",
    "open_index",
    "save_index",
]
