"""Names of models on the Hugging Face hub: `hf:owner/repo[@revision][:file]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeinfer.errors import ModelNotFound
from edgeinfer_models.file_kind import shown

PREFIX = "hf:"
FORM = "hf:owner/repo[@revision][:file]"

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
_NAME = re.compile(
    rf"hf:(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?", re.DOTALL
)
# What git allows in the name of a branch or tag, without what could be read as another path of a URL.
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/+-]*[A-Za-z0-9_+-])?")


@dataclass(frozen=True)
class HubName:
    repo: str  # owner/repo
    revision: str = ""  # branch, tag or commit; "" for the repository's default branch
    file: str = ""  # a path in the repository, or what selects one: see hub_choice.py; "" for its choice

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f":{self.file}" if self.file else "")


def is_hub_name(spec: str) -> bool:
    """Whether it was meant as one; `parse_hub_name` says whether it is one."""
    return spec.startswith(PREFIX)


def parse_hub_name(spec: str) -> HubName:
    """Raises ModelNotFound where it is none."""
    match = _NAME.fullmatch(spec)
    if match is None:
        raise ModelNotFound(f"{shown(spec)}: is not a model of the Hugging Face hub; write {FORM}")
    repo, revision, file = match["repo"], match["revision"] or "", match["file"] or ""
    if revision == "main":  # every repository's default branch; one model, one name
        revision = ""
    if ".." in repo or "--" in repo or len(repo) > 96:
        raise ModelNotFound(f"{shown(spec)}: the hub has no repositories with such a name; write {FORM}")
    if revision and (
        not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or len(revision) > 200
    ):
        raise ModelNotFound(f"{shown(spec)}: '{shown(revision)}' cannot be a branch, a tag or a commit")
    if file and not is_safe_path(file):
        raise ModelNotFound(f"{shown(spec)}: '{shown(file)}' cannot be a file of a repository")
    return HubName(repo, revision, file)


def is_safe_path(path: str) -> bool:
    """Whether a path that a repository lists stays inside it, and its last part can name a file here."""
    parts = path.split("/")
    return (
        len(path.encode("utf-8", "replace")) <= 1000
        and len(parts[-1].encode("utf-8", "replace")) <= 200
        and all(part not in ("", ".", "..") for part in parts)
        and not any(c in '\\:*?"<>|' or not c.isprintable() for c in path)
    )
