"""The real `edgeinfer models pull` against a stand-in of the hub, killed when it has so many bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.hub_stand_in import HubStandIn

COMMAND = (str(Path(sys.executable).with_name("edgeinfer")), "models", "pull")
_PATIENCE_S = 120.0


def kill_pull_at(hub: HubStandIn, spec: str, data: Path, point: int, *, hold: bool = True) -> int:
    """SIGKILL a pull when it has `point` bytes; the bytes it leaves. Raises AssertionError if it never
    gets there.

    hold: the hub sends no more than that; else the pull is killed while bytes come.
    """
    hub.faults.hold_at = point if hold else None
    process = subprocess.Popen(
        [*COMMAND, spec], env=environment(hub, data), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while bytes_kept(data) < point:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the pull never had {point} bytes: it has {bytes_kept(data)}")
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
        hub.release()
    return bytes_kept(data)


def pull_to_the_end(hub: HubStandIn, spec: str, data: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, spec],
        env=environment(hub, data),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
    )


def models_listed(hub: HubStandIn, data: Path) -> list[str]:
    """What `edgeinfer models list` calls installed."""
    done = subprocess.run(
        [*COMMAND[:2], "list", "--json"],
        env=environment(hub, data),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    return [model["name"] for model in json.loads(done.stdout)["models"] if model["installed"]]


def bytes_kept(data: Path) -> int:
    """Of unfinished downloads. Files go by the digest they are to have."""
    parts = [path for path in (data / "models" / ".partial").glob("*/*") if len(path.name) == 64]
    return sum(path.stat().st_size for path in parts if path.exists())


def environment(hub: HubStandIn, data: Path) -> dict[str, str]:
    return {
        **os.environ,
        **hub.environment,
        "EDGEINFER_DATA_DIR": str(data),
        "HF_HOME": str(data / "hf"),
    }
