"""A pull from the hub that is killed at ten points goes on where it was, to the published SHA-256.

Two ways: ten downloads, each killed once while bytes come and then finished; and one download that is
killed ten times in a row. The hub is a stand-in on loopback (`hub_stand_in.py`), whose log says what was
asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.hub_stand_in import HubStandIn
from benchmarks.killed_pull import kill_pull_at, models_listed, pull_to_the_end
from benchmarks.verdict import Bar, run_bar

POINTS, BYTES_PER_S = 10, 10_000_000
SPEC = "hf:owner/repo:model-Q4_K_M.gguf"


def measure(bar: Bar) -> None:
    size: int = bar.options.megabytes * 1_000_000
    content = b"GGUF" + random.Random(3).randbytes(size - 4)
    digest = hashlib.sha256(content).hexdigest()
    points = [size * (2 * i + 1) // (2 * POINTS) for i in range(POINTS)]
    with tempfile.TemporaryDirectory(prefix="edgeinfer-pulls-") as folder, HubStandIn() as hub:
        hub.add("owner/repo", {"model-Q4_K_M.gguf": content}, licence="mit")
        _each_killed_once(bar, hub, Path(folder), points, digest)
        _one_killed_often(bar, hub, Path(folder) / "often", points, digest)


def _each_killed_once(bar: Bar, hub: HubStandIn, folder: Path, points: list[int], digest: str) -> None:
    rows: list[tuple[str, ...]] = [("killed at", "kept", "went on at", "fetched twice", "SHA-256")]
    right = resumed = hidden = 0
    for number, point in enumerate(points):
        data = folder / str(number)
        hub.downloads.clear()
        hub.faults.bytes_per_s = BYTES_PER_S
        kept = kill_pull_at(hub, SPEC, data, point, hold=False)
        hub.faults.bytes_per_s = None
        hidden += SPEC not in models_listed(hub, data)
        done = pull_to_the_end(hub, SPEC, data)
        start = hub.downloads[-1].start
        good = done.returncode == 0 and _digest(data) == digest
        right += good
        resumed += len(hub.downloads) == 2 and hub.downloads[-1].is_range and start == kept
        rows.append(
            (f"{point:,}", f"{kept:,}", f"{start:,}", f"{kept - start:,}", "right" if good else "WRONG")
        )
    bar.say(table(rows))
    bar.details["killed once"] = [list(row) for row in rows]
    all_of = len(points)
    bar.require(f"{right} of {all_of} killed pulls end with the published SHA-256", right == all_of)
    bar.require(f"{resumed} of {all_of} go on exactly where they were", resumed == all_of)
    bar.require(f"{hidden} of {all_of} left nothing that is listed as a model", hidden == all_of)


def _one_killed_often(bar: Bar, hub: HubStandIn, data: Path, points: list[int], digest: str) -> None:
    hub.downloads.clear()
    kept = [kill_pull_at(hub, SPEC, data, point) for point in points]
    done = pull_to_the_end(hub, SPEC, data)
    starts = [asked.start for asked in hub.downloads]
    bar.say(f"one download killed {len(points)} times: requests began at {starts}")
    bar.details["starts"] = starts
    good = done.returncode == 0 and _digest(data) == digest
    bar.require(f"killed {len(points)} times in a row: SHA-256 {'right' if good else 'WRONG'}", good)
    bar.require("each request began where the last one ended", starts == [0, *kept])


def _digest(data: Path) -> str:
    """Of what is installed; "" where nothing is."""
    found = list(data.glob("models/hf--*/*.gguf"))
    return hashlib.sha256(found[0].read_bytes()).hexdigest() if len(found) == 1 else ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=20, help="size of the model that is pulled")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "a killed pull from the hub goes on where it was", measure, add_options))
