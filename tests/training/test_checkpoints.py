"""A checkpoint is whole under its name or not there: damage, full disks, crashes between system calls, two trainers."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightline.core.errors import CapacityError, CheckpointError
from sightline.training import checkpoints

Tensors = dict[str, dict[str, Tensor]]
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", checkpoints.MANIFEST)


def tensors(step: int) -> Tensors:
    values = torch.full((40, 25), float(step))
    return {
        "model": {"weight": values, "bias": values[0].clone()},
        "optimizer": {"weight/step": torch.tensor(float(step))},
    }


def saved(folder: Path, *steps: int) -> Path:
    """The last of some checkpoints."""
    paths = [checkpoints.save(folder, f"step-{step:07d}", tensors(step), {"step": step}) for step in steps]
    return paths[-1]


def newest_step(folder: Path, said: list[str]) -> int | None:
    found = checkpoints.newest(folder, said.append)
    if found is None:
        return None
    assert torch.equal(found.tensors["model"]["weight"], tensors(found.state["step"])["model"]["weight"])
    return int(found.state["step"])


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = checkpoints.load(saved(tmp_path, 5))
    assert found.state == {"step": 5}
    assert set(found.tensors) == {"model", "optimizer"}
    assert torch.equal(found.tensors["model"]["weight"], torch.full((40, 25), 5.0))
    assert sorted(path.name for path in found.path.iterdir()) == sorted(FILES)


def test_order_is_by_step_and_not_by_clock(tmp_path: Path) -> None:
    saved(tmp_path, 9, 10)
    for path, moment in zip(checkpoints.listed(tmp_path), (2_000_000_000, 1), strict=True):
        os.utime(path, (moment, moment))
    assert newest_step(tmp_path, []) == 10


# -------------------------------------------------------------------------------------------------------------- damage


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """1,000 random bits over all files."""
    path = saved(tmp_path, 5)
    rng = random.Random(0)
    for trial in range(1000):
        file = path / FILES[trial % 4]
        whole = file.read_bytes()
        bit = rng.randrange(len(whole) * 8)
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="step-0000005"):
            checkpoints.load(path)
        file.write_bytes(whole)
    assert checkpoints.load(path).state == {"step": 5}


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_missing_file_is_found(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, 5)
    whole = (path / name).read_bytes()
    for length in {0, 1, 8, len(whole) // 2, len(whole) - 1}:
        (path / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=r"missing|not whole"):
        checkpoints.load(path)


def test_swapped_files_and_foreign_manifests_are_found(tmp_path: Path) -> None:
    one, other = saved(tmp_path, 5), saved(tmp_path, 6)
    for name in FILES:
        before = (one / name).read_bytes()
        (one / name).write_bytes((other / name).read_bytes())
        with pytest.raises(CheckpointError):
            checkpoints.load(one)
        (one / name).write_bytes(before)
    (one / FILES[0]).rename(one / "x")
    (one / FILES[1]).rename(one / FILES[0])
    (one / "x").rename(one / FILES[1])
    with pytest.raises(CheckpointError):
        checkpoints.load(one)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", '{"files": []}', '{"files": {}}', '{"files": {"state.json": 3}}', '{"files": {"../a": {}}}'],
)
def test_a_manifest_that_says_nothing_is_told(tmp_path: Path, manifest: str) -> None:
    path = saved(tmp_path, 5)
    (path / checkpoints.MANIFEST).write_text(manifest)
    with pytest.raises(CheckpointError, match="manifest"):
        checkpoints.load(path)


def test_files_outside_the_checkpoint_are_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", 5)
    outside = tmp_path / "run" / "secret.json"
    outside.write_text("{}")
    manifest = json.loads((path / checkpoints.MANIFEST).read_text())
    manifest["files"]["../secret.json"] = {"bytes": 2, "sha256": checkpoints.digest(outside)}
    (path / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not name the files"):
        checkpoints.load(path)


def test_damaged_ones_are_passed_over_with_a_line_each(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step-0000003" / "state.json").unlink()
    (tmp_path / "step-0000002" / "model.safetensors").write_bytes(b"x")
    said: list[str] = []
    assert newest_step(tmp_path, said) == 1
    assert len(said) == 2 and "state.json: missing" in said[0] and "1 bytes, expected" in said[1]
    shutil.rmtree(tmp_path / "step-0000001")
    with pytest.raises(checkpoints.NoneWhole, match="none of its checkpoints is whole") as failure:
        newest_step(tmp_path, said)
    assert failure.value.exit_code == 66
    assert newest_step(tmp_path / "nowhere", said) is None


def test_a_damaged_later_one_does_not_count_as_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 9)
    (tmp_path / "step-0000009" / "state.json").unlink()
    saved(tmp_path, 3)
    checkpoints.prune(tmp_path, "step-0000003", keep=2)
    assert [path.name for path in checkpoints.listed(tmp_path)] == ["step-0000002", "step-0000003"]


# -------------------------------------------------------------------------------------------------- crashes in a save


def crash_at(call: int, work: Callable[[], None]) -> bool:
    """Do `work` in a child that dies just before its `call`-th change of the disk; whether it got that far."""
    child = os.fork()
    if child == 0:
        left = call

        def counting(function: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **kwargs: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(77)
                return function(*args, **kwargs)

            return counted

        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, counting(getattr(os, name)))
        Path.write_text = counting(Path.write_text)  # type: ignore[method-assign]
        checkpoints.write_tensors = counting(checkpoints.write_tensors)  # type: ignore[assignment]
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77


def test_a_crash_before_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Save step 3 over steps 1 and 2 and delete step 1, killed before the 1st, 2nd, ... change until none is left."""
    call, crashed = 0, True
    while crashed:
        call += 1
        folder = tmp_path / str(call)
        saved(folder, 1, 2)

        def work(folder: Path = folder) -> None:
            saved(folder, 3)
            checkpoints.prune(folder, "step-0000003", keep=2)

        crashed = crash_at(call, work)
        assert newest_step(folder, []) in (2, 3), call
        assert all(checkpoints.load(path) for path in checkpoints.listed(folder)), call
        checkpoints.sweep(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert call > 15  # the loop did reach the inside of a save
    assert newest_step(folder, []) == 3


def half_written(path: Path, *_: object) -> None:
    """As much of a file as a kill in the middle of its writing leaves."""
    path.write_bytes(b"\x10" * 1000)
    os._exit(77)


def test_a_crash_in_the_middle_of_a_file_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(checkpoints, "write_tensors", half_written)
            saved(tmp_path, 2)
        finally:  # whatever happens, no second pytest goes on from here
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert newest_step(tmp_path, []) == 1
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


CALLS = ("write", "pwrite64", "fsync", "ftruncate", "rename", "mkdir", "rmdir", "unlink", "unlinkat", "openat")


def killed_at(call: str, number: int, work: Callable[[], None]) -> bool:
    """Do `work` in a child that strace kills in its `number`-th system call of a kind; whether it got that far."""
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(wait, 1)
        work()
        os._exit(0)
    asked = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", "-p", str(child)]
    command = ["strace", "-f", "-o", "/dev/null", *asked]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        attached = "attached" in strace.stderr.readline()
        os.write(go, b"x")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(wait)
    os.close(go)
    if not attached:
        pytest.skip("strace may not look into processes here")
    return code == -signal.SIGKILL


@pytest.mark.kill
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_in_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path, call: str) -> None:
    """The same as above with the calls of everything, libraries among it, until none is left."""
    number, crashed = 0, True
    while crashed:
        number += 1
        folder = tmp_path / str(number)
        saved(folder, 1, 2)

        def work(folder: Path = folder) -> None:
            saved(folder, 3)
            checkpoints.prune(folder, "step-0000003", keep=2)

        crashed = killed_at(call, number, work)
        assert newest_step(folder, []) in (2, 3), number
        assert all(checkpoints.load(path) for path in checkpoints.listed(folder)), number
        checkpoints.sweep(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert newest_step(folder, []) == 3


# ----------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_full_disk_leaves_the_last_good_one(disk: Callable[[int], Path], tmp_path: Path, share: float) -> None:
    big = {"model": {"weight": torch.randn(600_000)}}
    path = checkpoints.save(tmp_path / "x", "a", big, {"step": 1})
    folder = disk(int(sum(-(-file.stat().st_size // 4096) * 4096 for file in path.iterdir()) * (1 + share)))
    checkpoints.save(folder, "step-1", big, {"step": 1})
    with pytest.raises(OSError, match="No space left") as failure:
        checkpoints.save(folder, "step-2", big, {"step": 2})
    assert failure.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    assert checkpoints.load(folder / "step-1").state == {"step": 1}


def test_a_disk_that_is_full_at_a_rotation_leaves_both(disk: Callable[[int], Path], tmp_path: Path) -> None:
    """Nothing old goes before what is new is there."""
    big = {"model": {"weight": torch.randn(600_000)}}
    path = checkpoints.save(tmp_path / "x", "a", big, {"step": 1})
    folder = disk(int(sum(-(-file.stat().st_size // 4096) * 4096 for file in path.iterdir()) * 2.5))
    for step in (1, 2):
        checkpoints.save(folder, f"step-{step}", big, {"step": step})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(folder, "step-3", big, {"step": 3})
    assert [checkpoints.load(path).state["step"] for path in checkpoints.listed(folder)] == [1, 2]


def test_a_failing_write_leaves_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a mount: every kind of write fails once."""
    saved(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, name in [(checkpoints, "write_tensors"), (Path, "write_text"), (os, "fsync"), (Path, "mkdir")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left"):
                saved(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert newest_step(tmp_path, []) == 1


# --------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys
from pathlib import Path
from sightline.training.checkpoints import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a run with spaces é"
    arguments = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told = pytest.raises(checkpoints.Busy, match=f"another trainer .process {other.pid} on")
        with told as failure, checkpoints.locked(folder):
            pass
        assert failure.value.exit_code == 73 and isinstance(failure.value, CapacityError)
        other.kill()
    with checkpoints.locked(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on")


def test_a_loader_that_outlives_its_trainer_does_not_hold_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        with checkpoints.locked(tmp_path):
            if os.fork() == 0:  # its loader process
                os.close(write)
                os.read(read, 1)
            os._exit(0)
    os.waitpid(trainer, 0)
    os.close(read)
    with checkpoints.locked(tmp_path):
        pass
    os.close(write)


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="cannot be written to"), checkpoints.locked(tmp_path / "file" / "run"):
        pass
