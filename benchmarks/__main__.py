"""`python -m benchmarks [NAME…] [-- OPTIONS…]`: run the bars whose files begin with a NAME, or all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BARS = Path(__file__).resolve().parent / "bars"


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, options = arguments[:split], arguments[split + 1 :]
    bars = sorted(path for path in BARS.glob("[0-9]*.py"))
    chosen = [bar for bar in bars if not names or any(bar.stem.startswith(name) for name in names)]
    if not chosen:
        known = ", ".join(bar.stem for bar in bars)
        print(f"no bar begins with {' or '.join(names)}; there are {known}", file=sys.stderr)
        return 2
    failed = []
    for bar in chosen:
        if subprocess.run([sys.executable, str(bar), *options]).returncode != 0:
            failed.append(bar.stem)
        print(flush=True)
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} bars hold"
        + "".join(f"\n  not: {f}" for f in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
