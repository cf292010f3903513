"""Servers of files: object stores and web servers, by obstore, and the Hugging Face Hub, by fsspec.

Nothing here tries again; ``remote.py`` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import urlopen

from dalle_cli.errors import UserError

WEB = ("https", "http")
BUCKETS = ("s3", "gs", "az")
HUB = "hf"
CHUNK = 1 << 20
"""Bytes of a stream that come together, and that are lost if its connection breaks."""
_PAGE = 64 << 20
"""Largest number of bytes that are read of a web page of links."""
_SILENCE = timedelta(seconds=30)
"""Time without a byte after which a connection counts as broken."""
_LONGEST = timedelta(days=7)
"""Time that a single download may take, as long as bytes come."""
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_SERVICE_ACCOUNT, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true for a public one",
    "hf": "HF_TOKEN",
}
"""Environment variables of each protocol's credentials."""
_ROLES = re.compile(r"/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity/")
"""Addresses at which machines in a cloud ask for credentials, as the last resort where there are no others."""
_PASSING = (408, 429)
"""HTTP's refusals that are worth another try."""
_LASTING = ("PermissionDeniedError", "UnauthenticatedError", "NotSupportedError")
"""Errors of obstore that another try does not change."""
_PREFIX = re.compile(r"^(Generic \w+ error: )?(.*Error performing .* in \S+ - )?(HTTP error: )?")
"""Beginning of obstore's errors, which repeats the address."""
_STATUS = re.compile(r"status code: (([45]\d\d)[\w -]*)")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
"""Reason that an object store gives in the body of its answer."""
_CAUSE = re.compile(r'(?:message|error): "([^"]*)"')
"""Reason of the operating system that obstore shows in the details of an error."""
_HUB_MARKS = ("blob_id", "xet_hash", "etag", "last_modified", "created")
"""Keys by which the Hub's file system tells a version of a file."""


class State(NamedTuple):
    """The number of bytes of a file, and the server's mark of this version, "" if it has none."""

    size: int
    mark: str


@dataclass(frozen=True)
class Fault:
    """An error of a server, in words that do not depend on the package that raised it."""

    reason: str
    mend: str | None = None
    missing: bool = False
    """There is no such file."""
    lasting: bool = False
    """Another try changes nothing."""
    credentials: bool = False
    """No credentials were found, or nobody answered who might have given them."""


class Listed(NamedTuple):
    """A file in a folder, with its state if the server lists that too."""

    url: str
    state: State | None


class Server(Protocol):
    """A server, whose files are named by their paths there."""

    def state(self, path: str) -> State: ...

    def read(self, path: str, spans: Sequence[tuple[int, int]]) -> Sequence[Any]:
        """Return the bytes from the first to before the second place of each of ``spans``; fewer at the file's end."""
        ...

    def stream(self, path: str, start: int) -> Iterator[bytes]:
        """Yield the bytes from ``start`` to the end."""
        ...

    def files(self, folder: str) -> list[Listed]:
        """Return the files of a folder, without those of the folders below it."""
        ...


def server_of(url: str) -> tuple[Server, str]:
    """Return the server of an address and the file's path there.

    Raises:
        UserError: there is no such kind of address, or its package is not installed.
    """
    protocol, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if protocol in WEB:  # a query, such as a signature, is sent with each path of the server
        path, mark, query = path.partition("?")
        return _server(f"{protocol}://{host}/{mark}{query}", os.getpid()), unquote(path)
    if protocol in BUCKETS:
        return _server(f"{protocol}://{host}", os.getpid()), path
    if protocol == HUB:
        return _server(f"{protocol}://", os.getpid()), rest
    known = ", ".join(f"{name}://" for name in (*WEB, *BUCKETS, HUB))
    raise UserError(f"{url}: there are no addresses of the kind {protocol}://; name a path, or one of {known}")


@lru_cache
def _server(base: str, _: int) -> Server:
    """Open a server; every process has its own, since connections do not survive a fork."""
    try:
        return _Hub() if base == f"{HUB}://" else _Obstore(base)
    except ImportError as error:
        raise UserError(f"{base}: {error}; pip install 'dalle-toolchain[remote]'") from None
    except RuntimeError:  # this process is a fork
        raise
    except Exception as error:  # obstore's, about an address or a variable of the environment that it cannot use
        raise UserError(f"{base}: {fault_of(error).reason}; look at the address and {credentials_of(base)}") from None


class _Obstore:
    """A bucket, or a web server, by obstore; credentials are those that obstore finds in the environment."""

    def __init__(self, base: str) -> None:
        self._base, self._web = base.partition("?")[0].rstrip("/"), base.startswith(WEB)
        self._api, self._store = _obstore(), _store_at(base)

    def state(self, path: str) -> State:
        try:
            return _state(self._api.head(self._store, path))
        except Exception:
            if not self._web:
                raise
            # Some web servers answer no HEAD, but tell the size with a range.
            return _state(self._api.get(self._store, path, options={"range": (0, 1)}).meta)

    def read(self, path: str, spans: Sequence[tuple[int, int]]) -> Sequence[Any]:
        starts, ends = zip(*spans, strict=True)
        found: Sequence[Any] = self._api.get_ranges(self._store, path, starts=starts, ends=ends, coalesce=0)
        return found

    def stream(self, path: str, start: int) -> Iterator[bytes]:
        # A web server without ranges can still be read from the start.
        options = {"range": {"offset": start}} if start else {}
        yield from map(bytes, self._api.get(self._store, path, options=options).stream(CHUNK))

    def files(self, folder: str) -> list[Listed]:
        if self._web:
            return _links(f"{self._base}/{quote(folder.strip('/'))}".rstrip("/") + "/")
        found = self._api.list_with_delimiter(self._store, folder.strip("/") or None)["objects"]
        return [Listed(f"{self._base}/{each['path']}", _state(each)) for each in found]


def _store_at(base: str) -> Any:
    """Return obstore's store of a bucket, a web server, or a folder there."""
    store = _obstore().store
    # A bucket's server is without encryption where the environment names it by http://.
    options = {"timeout": _LONGEST, "read_timeout": _SILENCE, "allow_http": not base.startswith("https://")}
    settings: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}
    return store.HTTPStore(base, **settings) if base.startswith(WEB) else store.from_url(base, **settings)


def store_of_objects(folder: str) -> Any:
    """Return obstore's store of the files in a folder at an address, for zarr.

    Raises:
        UserError: there is no such kind of address, its package is not installed, or it is on the Hub.
    """
    server_of(folder)
    if folder.startswith(f"{HUB}://"):
        raise UserError(f"{folder}: a token store is not read on the Hub; download it")
    if not folder.startswith(WEB):
        return _store_at(folder)
    parts = urlsplit(folder)
    return _store_at(urlunsplit(parts._replace(path=quote(unquote(parts.path)))))


def _state(facts: Any) -> State:
    """Return the state in obstore's description of an object; servers without times have that of 1970."""
    changed = facts["last_modified"]
    mark = facts["e_tag"] or (changed.isoformat() if changed.year > 1970 else "")
    return State(int(facts["size"]), mark.strip('"'))


def credentials_of(url: str) -> str:
    """Return the credentials of an address in words, with the environment variables that hold them."""
    names = _CREDENTIALS.get(url.partition("://")[0])
    return "your credentials" if names is None else f"your credentials ({names})"


def fault_of(error: Exception) -> Fault:
    """Return what an error of obstore, the standard library or huggingface_hub says."""
    text, _, details = str(error).partition("\n\nDebug source")  # obstore shows all causes below this line
    if _ROLES.search(text):
        return Fault("no credentials found", credentials=True)
    found = _STATUS.search(text)
    status = int(found[2]) if found else _status(error)
    missing = status in (404, 410) or (status is None and isinstance(error, FileNotFoundError))
    refused = status is not None and 400 <= status < 500 and status not in _PASSING
    refused = refused or isinstance(error, PermissionError) or type(error) is ValueError
    lasting = refused or type(error).__name__ in _LASTING
    if type(error).__name__ == "NotSupportedError":
        return Fault(
            "its server sends whole files alone", "name a folder with room for them by DALLE_CACHE", lasting=True
        )
    if "Content-Length" in text:
        return Fault("its server does not say how large it is", "download it", lasting=True)
    if "TimedOut" in details:
        return Fault("its server fell silent")
    why = _MESSAGE.search(text) if found else _CAUSE.search(details)
    first = _PREFIX.sub("", text.partition("\n")[0]) or type(error).__name__
    reason = found[1].strip() if found else first[:200]
    return Fault(f"{reason}: {why[1]}" if why else reason, missing=missing, lasting=lasting)


def _status(error: Exception) -> int | None:
    """Return HTTP's status of an error of the standard library or of huggingface_hub."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return None


_runs_in: int | None = None
"""Number of the process that runs obstore's threads; a fork of it has none of them, and would wait for ever."""


def _obstore() -> Any:
    global _runs_in
    import obstore.store

    _runs_in = os.getpid() if _runs_in is None else _runs_in
    if _runs_in != os.getpid():
        raise RuntimeError("obstore does not survive a fork; start the process afresh (see workers.map_blocks)")
    return obstore


class _Links(HTMLParser):
    """Collects the targets of a page's links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _links(url: str) -> list[Listed]:
    """Return the files below a web page that it links to, as web servers show a folder.

    The page is read by the standard library, since obstore refuses pages whose length is not said in advance.
    """
    with urlopen(url, timeout=_SILENCE.total_seconds()) as page:
        base, links = str(page.url), _Links()
        links.feed(page.read(_PAGE).decode("utf-8", "replace"))
    folder = base.rpartition("/")[0] + "/"
    found = (urldefrag(urljoin(base, link)).url for link in links.found)
    return [Listed(link, None) for link in dict.fromkeys(found) if link.startswith(folder) and link != folder]


class _Hub:
    """The Hugging Face Hub, by its fsspec file system; credentials are those of huggingface_hub."""

    def __init__(self) -> None:
        import fsspec

        self._files = fsspec.filesystem(HUB, skip_instance_cache=True)

    def state(self, path: str) -> State:
        facts = self._files.info(path)
        return State(int(facts["size"]), next((str(facts[mark]) for mark in _HUB_MARKS if facts.get(mark)), ""))

    def read(self, path: str, spans: Sequence[tuple[int, int]]) -> Sequence[Any]:
        return [self._files.cat_file(path, start=start, end=end) for start, end in spans]

    def stream(self, path: str, start: int) -> Iterator[bytes]:
        with self._files.open(path, block_size=4 * CHUNK) as file:
            file.seek(start)
            while data := file.read(CHUNK):
                yield data

    def files(self, folder: str) -> list[Listed]:
        found = (each["name"] for each in self._files.ls(folder, detail=True) if each["type"] == "file")
        return [Listed(f"{HUB}://{name}", None) for name in found]
