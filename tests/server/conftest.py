"""One endpoint with the real starter model for the tests of client libraries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.client import OpenOptions
from edgeinfer.server.api_keys import ApiKeys
from edgeinfer.server.guard import GuardSettings
from tests.server.endpoints import Endpoint, running
from tests.server.library_scenarios import KEY


@pytest.fixture(scope="session")
def starter_endpoint(starter: Path) -> Iterator[Endpoint]:
    """Needs the key KEY, as an endpoint of somebody else's would."""
    options = OpenOptions(model=str(starter), sequences=2, context=2048, threads=1)
    with running(options, guard=GuardSettings(keys=ApiKeys([KEY]))) as endpoint:
        yield endpoint
