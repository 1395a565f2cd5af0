"""`sightline --help` answers at once: without torch, in under half a second."""

import statistics
import subprocess
import sys
import time

HELP = "from sightline.cli import main; main()"


def test_help_does_not_import_torch() -> None:
    code = f"""
import sys
sys.argv = ["sightline", "--help"]
try:
    {HELP.replace("; ", chr(10) + "    ")}
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("ask", "chat", "answer", "models", "show", "pull", "convert", "train", "compare", "render"):
        assert verb in done.stdout


def test_help_takes_less_than_half_a_second() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", HELP, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.5
