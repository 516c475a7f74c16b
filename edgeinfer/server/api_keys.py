"""API keys: where they come from, how one is compared, and when there must be one."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from edgeinfer.errors import UsageError
from edgeinfer.server.hosts import is_loopback

VARIABLE = "EDGEINFER_API_KEY"
_MOST_FILE_BYTES = 1 << 20
_KEY = re.compile(r"[\x21-\x7e]{1,1024}")  # what a header can carry


class ApiKeys:
    """Any of them opens. Only their digests are kept, so none can end in a log or a traceback.

    Raises UsageError for a key that no client could send.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        digests = set()
        for key in keys:
            if not _KEY.fullmatch(key):
                raise UsageError(
                    "an API key is empty, too long or has blanks or characters beyond ASCII;"
                    " make one with `openssl rand -hex 24`"
                )
            digests.add(_digest(key.encode("ascii")))
        self._digests = tuple(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self)} API keys>"

    def match(self, key: bytes) -> bool:
        """In a time that says nothing about any key: digests are compared whole, and all of them."""
        digest = _digest(key)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_api_keys(
    given: Sequence[str] = (),
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[ApiKeys, list[str]]:
    """The keys, and warnings about where they lie.

    A flag (`given`) beats the variable; the file's keys count beside either. Raises UsageError.
    """
    environment = os.environ if environment is None else environment
    keys = list(given)
    if not keys and VARIABLE in environment:
        # An empty variable is a forgotten secret: whoever set it thinks that there is a key.
        if not environment[VARIABLE].strip():
            raise UsageError(f"{VARIABLE} is set and empty; give it a key or unset it")
        keys.append(environment[VARIABLE].strip())
    warnings = []
    if file is not None:
        keys += _read_file(file)
        warnings += _warnings(file)
    return ApiKeys(keys), warnings


def _read_file(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MOST_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--api-key-file {file}: {error.strerror or error}") from error
    if len(data) > _MOST_FILE_BYTES:
        raise UsageError(f"--api-key-file {file} is larger than 1 MiB; it holds one key a line")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"--api-key-file {file} is not text; it holds one key a line") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {file} has no key in it; write one a line")
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#") and not _KEY.fullmatch(line):
            raise UsageError(
                f"--api-key-file {file}, line {number}: a key has no blanks and only ASCII characters"
            )
    return keys


def _warnings(file: Path) -> list[str]:
    if os.name == "nt":  # its modes say nothing about who may read
        return []
    mode = file.stat().st_mode
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        return [f"{file} can be read by every user of this machine; run `chmod 600 {file}`"]
    return []


def check_binding(host: str, keys: ApiKeys, waived: bool, allow_origins: Collection[str] = ()) -> None:
    """Raises UsageError where strangers could use the endpoint and nobody said that they may.

    waived: --no-api-key. It does not cover every web page at once (`--allow-origin '*'`): with both, any
    site that anybody in the network looks at could use the endpoint.
    """
    if len(keys) > 0 or is_loopback(host):
        return
    if not waived:
        raise UsageError(
            f"--host {host or '(all)'} can be reached from other machines, and there is no API key; give"
            " one with --api-key-file, or say --no-api-key if everybody there may use it"
        )
    if "*" in {origin.strip() for origin in allow_origins}:
        raise UsageError(
            f"--allow-origin '*' without an API key is possible on 127.0.0.1 only, not on {host};"
            " give a key, or name the origins"
        )
