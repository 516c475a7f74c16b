"""The Hugging Face hub, through huggingface_hub: what a repository holds, and a file's bytes from an
offset on.

The library makes the requests (addresses, tokens, proxies, certificates, HF_ENDPOINT), but not the
download: its `hf_hub_download` writes to a temporary file of a random name and deletes that when it
fails (read in 2.4.0), so that nothing could go on after a kill, and its cache would hold a second copy.
Xet transfers go through that same function.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeinfer.errors import DownloadFailed, HubUnreachable, ModelError, ModelNotFound, one_line
from edgeinfer_models.hub_name import HubName

_TRIES, _WAIT_S = 3, 1.0
_DIGEST, _COMMIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "ON", "YES", "TRUE")  # as the library reads its variables


@dataclass(frozen=True)
class HubFile:
    path: str  # in the repository; not trusted
    num_bytes: int
    sha256: str  # "" where the hub knows none: the file is not in its large-file storage


@dataclass(frozen=True)
class Repository:
    name: HubName
    commit: str
    licence: str  # of its model card; "" if it names none
    files: tuple[HubFile, ...]


class BrokenOff(Exception):
    """A connection ended or a server stumbled; trying again may help. Never leaves this room."""


@dataclass(frozen=True)
class Body:
    """The answer to a request for a file's bytes."""

    offset: int  # of its first byte in the file: what was asked for, or 0
    total_bytes: int | None  # of the whole file, if it says so
    chunks: Iterator[bytes]  # raises BrokenOff


class Hub:
    """One session with the hub. Its messages name models as the user does and never hold the token."""

    def __init__(self) -> None:
        """Raises HubUnreachable in offline mode, DownloadFailed."""
        if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
            raise HubUnreachable("offline mode is on; unset HF_HUB_OFFLINE to ask the hub")
        library = _library()
        self._library = library
        self.endpoint = (os.environ.get("HF_ENDPOINT") or library.constants.ENDPOINT).rstrip("/")
        self._timeout_s = float(library.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        self._token = _token(library)

    def repository(self, name: HubName) -> Repository:
        """What a revision holds. Raises ModelNotFound, DownloadFailed."""
        api = self._library.HfApi(
            endpoint=self.endpoint, token=self._token or False, library_name="edgeinfer"
        )
        for attempt in range(_TRIES):
            try:
                info = api.model_info(
                    name.repo,
                    revision=name.revision or None,
                    files_metadata=True,
                    timeout=self._timeout_s,
                )
                return _repository(name, info)
            except self._library.errors.HfHubHTTPError as error:
                if error.response.status_code < 500 or attempt == _TRIES - 1:
                    raise self._refusal(name, error.response) from None
            except (self._http.HTTPError, self._http.InvalidURL, OSError) as error:
                http = self._http
                refused = isinstance(
                    error,
                    (
                        http.ConnectError,
                        http.ConnectTimeout,
                        http.UnsupportedProtocol,
                        http.InvalidURL,
                        OSError,
                    ),
                )
                if refused or attempt == _TRIES - 1:
                    raise self._unreachable(error) from None
            except (AttributeError, KeyError, TypeError, ValueError):
                raise DownloadFailed(
                    f"{name}: what {self.site} answered is no description of a repository;"
                    " check HF_ENDPOINT and the proxy"
                ) from None
            time.sleep(_WAIT_S)
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def open(self, repository: Repository, path: str, offset: int) -> Iterator[Body]:
        """A file's bytes from `offset` on, or from the beginning if the server knows no ranges.

        Raises BrokenOff, ModelNotFound, DownloadFailed.
        """
        utils = self._library.utils
        url = self._library.hf_hub_url(
            repository.name.repo, path, revision=repository.commit, endpoint=self.endpoint
        )
        headers = utils.build_hf_headers(token=self._token or False, library_name="edgeinfer")
        headers["Accept-Encoding"] = "identity"  # an offset counts bytes of the file
        if offset:
            headers["Range"] = f"bytes={offset}-"
        http = self._http
        try:
            # To another host than the hub's, the session does not send the token on.
            with utils.get_session().stream(
                "GET", url, headers=headers, timeout=self._timeout_s, follow_redirects=True
            ) as response:
                if response.status_code in (408, 429) or response.status_code >= 500:
                    raise BrokenOff(f"the server answered {response.status_code}")
                if response.status_code not in (200, 206, 416):
                    raise self._refusal(repository.name, response, path)
                yield _body(response, offset, http)
        except (http.HTTPError, http.InvalidURL, http.StreamError, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, ConnectionError):
                raise  # our own disk's: the caller writes inside the block
            raise BrokenOff(self._reason(error)) from None

    @property
    def site(self) -> str:
        """The endpoint for a message, without what a mirror's address may carry before an @."""
        return re.sub(r"//[^/]*@", "//", self.endpoint)

    @property
    def _http(self) -> Any:
        return _http_library(self._library.utils.get_session())

    def _unreachable(self, error: Exception) -> HubUnreachable:
        return HubUnreachable(
            f"{self.site} cannot be reached ({self._reason(error)}); check the network,"
            " the proxy and HF_ENDPOINT"
        )

    def _reason(self, error: Exception) -> str:
        text = one_line(str(error), 200) or type(error).__name__
        return text.replace(self._token, "…") if self._token else text

    def _refusal(self, name: HubName, response: Any, path: str = "") -> ModelError:
        """What a status means to the user. The server's own words are not repeated: they are as foreign
        as its files."""
        status, code = response.status_code, response.headers.get("X-Error-Code", "")
        repository = str(HubName(name.repo, name.revision))
        if code == "GatedRepo" or (status == 403 and not code):
            page = f"{self.site}/{name.repo}"
            if self._token:
                return DownloadFailed(
                    f"{repository}: the account of your token has no access; ask for it at {page}, and"
                    " see that the token may read gated repositories"
                )
            return DownloadFailed(
                f"{repository}: its owner wants to be asked first; ask for access at {page}, then put an"
                " access token of your account into the variable HF_TOKEN"
            )
        if code == "RevisionNotFound":
            return ModelNotFound(
                f"{repository}: the repository has no branch, tag or commit '{name.revision}'"
            )
        if code == "EntryNotFound" and path:
            return ModelNotFound(f"{repository}: has no file {path}; it may just have been changed")
        if status == 401 and self._token:
            return DownloadFailed(
                f"{repository}: the hub does not accept your access token, or there is no such"
                " repository; check the name and HF_TOKEN"
            )
        if status in (401, 404):
            return ModelNotFound(
                f"{repository}: there is no such repository on the hub, or it is private; check the name"
                + ("" if self._token else ", or put an access token into the variable HF_TOKEN")
            )
        if status == 429:
            return DownloadFailed(
                f"{repository}: the hub has had too many requests from here; try again in a few minutes"
            )
        return DownloadFailed(f"{repository}: {self.site} answered {status}; try again later")


def _library() -> Any:
    """huggingface_hub, quiet and without telemetry. Raises DownloadFailed."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about variables of other tools' transfers
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.utils
    except ImportError as error:
        raise DownloadFailed(
            f"models of the hub need the package huggingface_hub ({error}); install it"
        ) from None
    except ValueError as error:  # HF_HUB_DOWNLOAD_TIMEOUT=soon
        raise DownloadFailed(f"a HF_… variable cannot be used: {error}") from None
    library: Any = huggingface_hub
    library.constants.HF_HUB_DISABLE_TELEMETRY = True
    library.utils.logging.set_verbosity_error()
    return library


def _http_library(session: object) -> Any:
    """httpx or httpx2: huggingface_hub 1.x makes its sessions with the one, 2.x with the other."""
    for cls in type(session).__mro__:
        module = sys.modules.get(cls.__module__.partition(".")[0])
        if module is not None and hasattr(module, "HTTPError"):
            return module
    raise DownloadFailed("this version of huggingface_hub is not known to edgeinfer; update edgeinfer")


def _token(library: Any) -> str:
    """The access token of the user: HF_TOKEN, or the saved login; "" if there is none.

    Raises DownloadFailed for one that no header could carry: the session's own complaint would print it.
    """
    if library.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return ""
    token = str(library.get_token() or "")
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise DownloadFailed(
            "the access token in HF_TOKEN (or the saved login) has characters that no token has;"
            " copy it again"
        )
    return token


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in _TRUE


def _repository(name: HubName, info: Any) -> Repository:
    """Raises AttributeError, TypeError or ValueError for an answer that cannot be."""
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError("no commit")
    files = []
    for sibling in info.siblings:
        lfs = sibling.lfs
        digest = lfs.sha256 if lfs is not None else ""
        num_bytes = lfs.size if lfs is not None else sibling.size or 0
        if type(num_bytes) is not int or num_bytes < 0 or not isinstance(sibling.rfilename, str):
            raise ValueError("no file")
        if digest and not _DIGEST.fullmatch(digest):
            raise ValueError("no digest")
        files.append(HubFile(sibling.rfilename, num_bytes, digest))
    return Repository(name, info.sha, _licence(info), tuple(files))


def _licence(info: Any) -> str:
    card = getattr(info, "card_data", None)
    named = getattr(card, "license", None)
    if named == "other":
        named = getattr(card, "license_name", None) or named
    if isinstance(named, list):
        named = ", ".join(str(each) for each in named)
    if not named:
        tags = [tag for tag in info.tags or () if isinstance(tag, str)]
        named = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")
    return one_line(str(named), 80)


def _body(response: Any, offset: int, http: Any) -> Body:
    total: int | None = None
    if response.status_code == 416:  # the file ends before our offset
        found = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
        return Body(offset, int(found[1]) if found else 0, iter(()))
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset:
            raise BrokenOff("the server sent another part than was asked for")
        total = None if found[2] == "*" else int(found[2])
    else:
        offset = 0
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BrokenOff("the server compressed what must not be")
    return Body(offset, total, _chunks(response, http))


def _chunks(response: Any, http: Any) -> Iterator[bytes]:
    try:
        yield from response.iter_raw()
    except (http.HTTPError, http.StreamError, OSError) as error:
        raise BrokenOff(one_line(str(error), 200) or type(error).__name__) from None
