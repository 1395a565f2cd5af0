"""Work that other processes do ahead of time, in order; one that dies, stops or runs out of memory is replaced.

A process gives what it made as a file in memory, whose descriptor goes through a socket: nothing is ever read that is
half done, and nothing is left of a process that died. Its replacement does the same work again.
"""

import errno
import io
import mmap
import os
import pickle
import signal
import socket
import struct
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core.errors import CapacityError, DataError
from .records import tell
from .signals import leave_to_parent

SILENT = 30.0  # seconds without a result or any use of a processor, after which a process is taken for stopped
DEATHS = 3  # of processes at one place, after which it is given up
NOWHERE = -1
ALIGNED = 64  # bytes, as memory that torch takes itself: kernels must find the same

_TASK, _RESULT, _SIZE = struct.Struct("<q"), struct.Struct("<q?"), struct.Struct("<q")
_place: mmap.mmap | None = None  # of this process, if it is a worker


def at(place: int) -> None:
    """Leave word of what this process is at, for the one that finds it dead."""
    if _place is not None:
        _place[:] = _TASK.pack(place)


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; torch has no kind of its own for that on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def ahead(
    make: Callable[[int], Any], count: int, workers: int, each: int, give_up: Callable[[int, str], None]
) -> Generator[Any, None, None]:
    """make(0), make(1), ... made by so many processes, of which each has up to `each` of them before it.

    give_up: told of a place (as `at` has it) where three processes ended, and how, before the next one comes to it.
    What `make` raises is raised here. DataError where three end at no place. Close it when it is left early.
    """
    pool = Pool(make, workers, give_up)
    with closing(pool):
        sent = 0
        for task in range(count):
            pool.listen(0)
            while sent < min(count, task + workers * each):
                pool.send(sent)
                sent += 1
            while task not in pool.ready:
                pool.listen(min(1.0, SILENT / 4))
            done, found = pool.ready.pop(task)
            if not done:
                raise found
            yield found


class Worker:
    """A fork of this process that does tasks in the order in which they are sent, and ends with it."""

    def __init__(self, make: Callable[[int], Any], others: list[socket.socket]) -> None:
        self.place, self.tasks = mmap.mmap(-1, _TASK.size), deque[int]()
        self.place[:] = _TASK.pack(NOWHERE)
        self.silent, self.used = 0.0, [""]
        self.link, theirs = socket.socketpair()
        try:
            self.process = os.fork()
        except OSError as error:
            raise CapacityError(f"no further loader process can be started ({error.strerror})") from None
        if self.process == 0:
            for link in (self.link, *others):  # or they would seem open after the trainer has gone
                link.close()
            _serve(make, theirs, self.place)
        theirs.close()

    def send(self, task: int) -> None:
        """Add a task to those before it."""
        self.tasks.append(task)
        with suppress(BrokenPipeError):  # found dead when it is listened to
            self.link.sendall(_TASK.pack(task))

    def receive(self) -> tuple[int, tuple[bool, Any]] | None:
        """The next task that is done, whether it could be, and what came of it; None of a process that is dead."""
        try:
            data, files, *_ = socket.recv_fds(self.link, _RESULT.size, 1)
        except ConnectionResetError:
            return None
        if len(data) < _RESULT.size or not files:
            return None
        self.silent = 0.0
        task, done = _RESULT.unpack(data)
        self.tasks.remove(task)
        return task, (done, _read(files[0]))

    def idles(self, seconds: float) -> bool:
        """Take note of so many seconds without a result; whether it has done nothing at all for too long."""
        used = _processor_time(self.process)
        self.silent, self.used = (self.silent + seconds if used == self.used else 0.0), used
        return self.silent >= SILENT

    def end(self) -> int:
        """End the process and say how it ended: its exit code, or the negative number of a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        self.link.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


class Pool:
    """Some workers and what they have given; ready: whether a task could be done and what came of it, by its number."""

    def __init__(self, make: Callable[[int], Any], count: int, give_up: Callable[[int, str], None]) -> None:
        self.make, self.give_up = make, give_up
        self.ready: dict[int, tuple[bool, Any]] = {}
        self.deaths = Counter[tuple[int, int]]()
        self.workers: list[Worker] = []
        for _ in range(count):
            self.workers.append(self.started())

    def started(self) -> Worker:
        return Worker(self.make, [worker.link for worker in self.workers])

    def send(self, task: int) -> None:
        """Give a task to whoever has fewest."""
        min(self.workers, key=lambda worker: len(worker.tasks)).send(task)

    def listen(self, seconds: float) -> None:
        """Take what there is, or wait so long for something; replace whoever is dead or stopped."""
        talking = wait([worker.link for worker in self.workers], seconds)
        for i, worker in enumerate(self.workers):
            if worker.link in talking:
                if (found := worker.receive()) is None:
                    self.replace(i, _how(worker.process))
                else:
                    self.ready[found[0]] = found[1]
            # counted in waits and not by the clock, which goes on while all of them are stopped
            elif not talking and seconds and worker.tasks and worker.idles(seconds):
                self.replace(i, f"did nothing for {SILENT:g} seconds")

    def replace(self, i: int, how: str) -> None:
        """Let another process do what one has not done; give up the place where it is not the first to end."""
        old = self.workers.pop(i)
        old.end()
        tell(f"a loader process {how}; another one does its work again")
        if old.tasks:
            (place,) = _TASK.unpack(old.place[:])
            where = (old.tasks[0], place)
            self.deaths[where] += 1
            if self.deaths[where] == DEATHS and place == NOWHERE:
                raise DataError(f"{DEATHS} loader processes ended over batch {old.tasks[0]}; the last {how}")
            if self.deaths[where] == DEATHS:
                self.give_up(place, f"{DEATHS} loader processes ended over it; the last {how}")
        new = self.started()
        self.workers.insert(i, new)
        for task in old.tasks:
            new.send(task)

    def close(self) -> None:
        while self.workers:
            self.workers.pop().end()


def _serve(make: Callable[[int], Any], link: socket.socket, place: mmap.mmap) -> NoReturn:
    """What a worker does until nobody is there any more to ask for something."""
    global _place
    code = 1
    try:
        leave_to_parent()
        torch.set_num_threads(1)  # it shares the machine with a training step
        _place = place
        while asked := link.recv(_TASK.size, socket.MSG_WAITALL):
            (task,) = _TASK.unpack(asked)
            at(NOWHERE)
            found, done = _tried(make, task)
            _send(link, task, done, found)
        code = 0
    except OSError as error:
        code = errno.ENOMEM if error.errno == errno.ENOMEM else 1
    except Exception as error:
        if short_of_memory(error):
            code = errno.ENOMEM
        else:
            traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the trainer may run twice


def _tried(make: Callable[[int], Any], task: int) -> tuple[Any, bool]:
    """What came of a task, and whether it could be done; else the error, with the way it took as a note."""
    try:
        return make(task), True
    except Exception as error:
        if short_of_memory(error):  # a new process has what this one holds
            raise
        error.add_note(traceback.format_exc())
        try:
            return pickle.loads(pickle.dumps(error)), False
        except Exception:
            return RuntimeError(traceback.format_exc()), False


class _Pickler(pickle.Pickler):
    """Leaves the values of tensors where they are, beside the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or not value.is_contiguous() or not value.numel():
            return NotImplemented
        flat = value.detach().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (value.dtype, tuple(value.shape), pickle.PickleBuffer(flat))


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], buffer: memoryview) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def _send(link: socket.socket, task: int, done: bool, value: Any) -> None:
    """Hand over a value in a file: the number of its parts, the length of each, and the parts on round addresses."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, 5, buffer_callback=buffers.append).dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = [len(part) for part in parts]
    starts = _starts(sizes)
    file = _nameless()
    try:
        os.ftruncate(file, starts[-1])
        with mmap.mmap(file, starts[-1]) as there:
            head = b"".join(map(_SIZE.pack, (len(sizes), *sizes)))
            there[: len(head)] = head
            for start, size, part in zip(starts, sizes, parts, strict=False):
                there[start : start + size] = part
        socket.send_fds(link, [_RESULT.pack(task, done)], [file])
    finally:
        os.close(file)


def _nameless() -> int:
    """A file that is there as long as somebody has it open; in memory, where the system knows such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with TemporaryFile() as file:
        return os.dup(file.fileno())


def _read(file: int) -> Any:
    """The value in a file; its tensors lie in it, and go with them."""
    try:
        there = memoryview(mmap.mmap(file, 0))
    finally:
        os.close(file)
    (count,) = _SIZE.unpack_from(there)
    sizes = [_SIZE.unpack_from(there, _SIZE.size * (i + 1))[0] for i in range(count)]
    parts = [there[start : start + size] for start, size in zip(_starts(sizes), sizes, strict=False)]
    return pickle.loads(parts[0], buffers=parts[1:])  # from a fork of this process, which has no name to be reached by


def _starts(sizes: list[int]) -> list[int]:
    """Where parts of these sizes begin in a file, and where it ends."""
    rounded = [-(-size // ALIGNED) * ALIGNED for size in (_SIZE.size * (len(sizes) + 1), *sizes)]
    return list(accumulate(rounded))


def _processor_time(process: int) -> list[str]:
    """How much a process and its children have computed; the same for ever where the system does not say."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:15]
    return [""]


def _how(process: int) -> str:
    """How a process ended that is no longer there, left for `end` to be waited for."""
    found = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    if found is None or found.si_code == os.CLD_EXITED:
        status = found.si_status if found else 0
        return "ran out of memory" if status == errno.ENOMEM else f"ended with exit code {status}"
    return f"was killed by signal {found.si_status}"
