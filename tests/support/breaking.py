"""Hold proto/ compatible with the last release, or with main where nothing was released yet."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "tests" / "support" / "released"


def main() -> int:
    """Compare with the descriptor of what is promised: tests/support/released/v1.binpb."""
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf is not None, "buf is part of the development dependencies"
    against = RELEASED / "v1.binpb"
    if not against.exists():
        print("no released API to compare with yet")  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        command = [buf, "breaking", "proto", "--against", str(against)]
        return subprocess.run(command, cwd=ROOT, check=False, env={"HOME": scratch}).returncode


if __name__ == "__main__":
    sys.exit(main())
