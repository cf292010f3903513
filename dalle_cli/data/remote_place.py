"""Token stores on a server: the arrays by zarr's own store of objects, and the files beside them by ranges."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from zarr.storage import ObjectStore, WrapperStore

from dalle_cli.data.remote import PAUSES, Missing, RemoteFile, again, require_another_try
from dalle_cli.data.servers import WEB, store_of_objects
from dalle_cli.errors import UserError

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


@dataclass(frozen=True)
class AddressOfStore:
    """A token store, or a file or folder in it, at an address; see ``stores.places.RemotePlace``."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> AddressOfStore:
        path, mark, query = self.url.partition("?")  # a signature of the web's is sent with each file
        return AddressOfStore(f"{path.rstrip('/')}/{name}{mark}{query}")

    def is_file(self) -> bool:
        try:
            RemoteFile(self.url).size()
        except Missing:
            return False
        return True

    def read_bytes(self) -> bytes:
        file = RemoteFile(self.url)
        try:
            return file.read(0, file.size())
        except Missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None

    def zarr(self) -> Any:
        return _Objects(ObjectStore(store_of_objects(self.url), read_only=True), self)

    def names(self) -> set[str] | None:
        if self.url.startswith(WEB):
            return None
        store = ObjectStore(store_of_objects(self.url), read_only=True)

        async def listed() -> set[str]:
            return {name async for name in store.list_dir("")}

        return again(self.url, lambda: asyncio.run(listed()))


class _Objects(WrapperStore[ObjectStore[Any]]):
    """Objects in a folder, each read of which is tried again; all chunks are there."""

    def __init__(self, store: ObjectStore[Any], place: AddressOfStore) -> None:
        super().__init__(store)
        self._place = place

    def _with_store(self, store: ObjectStore[Any]) -> Self:
        return type(self)(store, self._place)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of an object; None if it is missing and no chunk, which zarr would take for zeros.

        Raises:
            UserError: a chunk is missing or empty; the server cannot be reached.
        """
        place = self._place / key
        for pause in (*PAUSES, None):
            try:
                found = await self._store.get(key, prototype, byte_range)
            except Exception as error:  # each kind of server has errors of its own
                require_another_try(str(place), error, pause)
                await asyncio.sleep(pause or 0)
            else:
                if "/c/" in key and not found:
                    raise UserError(f"{place}: is {'missing' if found is None else 'empty'}; copy the store again")
                return found
        raise AssertionError

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        # Zarr reads by ``get`` alone so far; a later version that reads by this must meet the same checks.
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]
