"""`make test` and `make demo` say how long they take before anything takes long, and pip is not silent."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_each_long_command_is_preceded_by_a_line_with_its_time(target: str, tmp_path: Path) -> None:
    command = ["make", "--dry-run", "--directory", str(ROOT), f"VENV={tmp_path / 'venv'}", target]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (install,) = [place for place, line in enumerate(lines) if "pip install" in line]
    (work,) = [place for place, line in enumerate(lines) if line.endswith("espalier demo") or "-m pytest" in line]
    told = [place for place, line in enumerate(lines) if line.startswith('echo "espalier: ') and "minute" in line]
    assert len(told) == 2 and told[0] < install < told[1] < work
    assert "--quiet" not in lines[install] and "-q " not in lines[install]
