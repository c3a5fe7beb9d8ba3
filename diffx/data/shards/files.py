"""The shards that a process has open, a bounded number of them."""

import mmap
import os
from collections import OrderedDict
from typing import Any

from diffx.data.shards.patterns import is_remote
from diffx.data.shards.remote import Copies
from diffx.data.shards.table import Table
from diffx.utils import DiffxError

_MOST = 256


class OpenShards:
    """Descriptors of shards, opened when they are first needed, the longest unused closed for new ones.

    They are read by `os.pread`, which needs no position and may be used by several processes after a fork, or mapped.

    Arguments:
        table: names the shards, and says what they were like when they were indexed.
        copies: of remote shards.
    """

    def __init__(self, table: Table, copies: Copies) -> None:
        self.table = table
        self.copies = copies
        self._open: OrderedDict[int, int] = OrderedDict()
        self._latest = -1
        self._maps: OrderedDict[int, memoryview] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "copies": self.copies,
            "_open": OrderedDict(),
            "_latest": -1,
            "_maps": OrderedDict(),
        }

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)

    def get(self, shard: int) -> int:
        """The descriptor of a shard, valid until the next call.

        Raises:
            DiffxError: if the shard is missing, cannot be fetched, or has changed since it was indexed.
        """
        if shard not in self._open:
            if len(self._open) == _MOST:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = self._opened(shard)
        if shard != self._latest:
            self._open.move_to_end(shard)
            self._latest = shard
        return self._open[shard]

    def map(self, shard: int) -> memoryview:
        """The bytes of a shard; errors as in `get`."""
        if shard not in self._maps:
            if len(self._maps) == _MOST:
                self._maps.popitem(last=False)
            self._maps[shard] = memoryview(mmap.mmap(self.get(shard), 0, access=mmap.ACCESS_READ))
        self._maps.move_to_end(shard)
        return self._maps[shard]

    def _opened(self, shard: int) -> int:
        name = self.table.members[shard].name
        size, changed = self.table.identities[shard].tolist()
        path = str(self.copies.fetch(name, size)) if is_remote(name) else name
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise DiffxError(
                f"the shard '{name}' cannot be opened any more ({error.strerror}); put it back and run the same command"
            ) from error
        status = os.fstat(descriptor)
        if status.st_size != size or (changed and status.st_mtime_ns != changed):
            os.close(descriptor)
            raise DiffxError(
                f"the shard '{name}' has changed since training started; put back what it was, or run the same command "
                "to index it anew"
            )
        return descriptor
