"""Several processes as one run, as `torchrun` starts them; alone, everything here is as if it were not there.

Tensors are summed where they lie, by NCCL or gloo. Whatever else is told to one another goes as JSON over gloo.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from ..core.errors import SightlineError
from .signals import leave_to_parent

T = TypeVar("T")

STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")  # what torchrun tells its processes
TIMEOUT = timedelta(minutes=30)  # how long the others are waited for: an evaluation or a slow disk takes its time
BUCKET = 1 << 25  # gradients that are summed at once
LISTENS = 1.0  # seconds between two looks at whether another process asks for this one
HEARD = 3.0  # seconds after which one that has not answered is gone


class Lost(SightlineError):
    """The other processes of a run have died, or do not answer."""

    exit_code = 75


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def started() -> bool:
    """Whether this process is one of a run's, be it the only one."""
    return distributed.is_initialized()


def first() -> bool:
    """Whether this process is the one that writes and tells."""
    return rank() == 0


def device() -> str:
    """Where this process computes: on a GPU of its own if there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


@contextmanager
def joined() -> Iterator[None]:
    """Within this context the processes that torchrun started are one run; Lost where others leave it too early."""
    if distributed.is_initialized() or not all(name in os.environ for name in STARTED):
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(device())
    told: set[int] = set()
    with ExitStack() as left:
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
            left.enter_context(_answering(told))
            yield
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise
            raise Lost(_alone(error, told)) from None
    distributed.destroy_process_group()  # after an error nobody waits for the others: torchrun ends them


def _alone(error: RuntimeError, told: set[int]) -> str:
    """Which processes this one waits for in vain, and in what; told: as in `_answering`."""
    inside = Path(distributed.__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if inside in Path(f.filename).parents]
    calls = [f.name for f in frames if f.name != "wrapper"]
    me, count, where = os.environ["RANK"], os.environ["WORLD_SIZE"], f" in {calls[-1]}" if calls else ""
    with suppress(ValueError):
        leave_to_parent()  # torchrun ends this one as soon as it finds the other dead; the line comes first
    gone = _gone(told)
    which = ", ".join(map(str, gone[:8])) + (" and others" if len(gone) > 8 else "")
    if not gone:
        line = f"rank {me} of {count} waited too long{where}, though all others are there"
    elif len(gone) == 1:
        line = f"rank {which} of {count} is gone, rank {me} waited for it{where}"
    else:
        line = f"ranks {which} of {count} are gone, rank {me} waited for them{where}"
    return f"{line}; started again, the run goes on from its last checkpoint"


def _line() -> distributed.Store:
    """Where processes ask for one another: the store by which they have met, of this start alone."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=HEARD))
    return distributed.PrefixStore(f"there {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


@contextmanager
def _answering(told: set[int]) -> Iterator[None]:
    """Within this context a process that is asked whether it is there says so, whatever it is busy with.

    told: is given the ranks that others have found to be gone. Who waits for one of these others learns of that by its
    leaving, when it may be too late to ask.
    """
    left = threading.Event()

    def answer() -> None:
        with suppress(RuntimeError):  # who keeps the store is gone, which this process will find out
            line, answered = _line(), False
            while not left.wait(LISTENS):
                if not answered and line.check(["asked"]):
                    line.set(os.environ["RANK"], "")
                    answered = True
                if line.check(["gone"]):
                    told.update(json.loads(line.get("gone")))
                    return

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join(LISTENS)


def _gone(told: set[int]) -> list[int]:
    """The ranks of those that do not answer, for the others to know as well.

    Where the store does not answer either, those that others have told of, or else the first one, which keeps it.
    """
    others = set(range(int(os.environ["WORLD_SIZE"]))) - {int(os.environ["RANK"])}
    silent: set[int] = set()

    def ask() -> None:
        with suppress(RuntimeError):
            line = _line()
            line.set(os.environ["RANK"], "")  # it may have ended when another one asks
            line.set("asked", "")
            line.check(["asked"])
            silent.update(others)
            while silent:
                silent.difference_update([rank for rank in silent if line.check([str(rank)])])
                time.sleep(LISTENS / 10)
            heard.set()

    heard = threading.Event()
    threading.Thread(target=ask, daemon=True).start()
    if heard.wait(HEARD):
        return []
    if not silent:
        return sorted(told & others) or [0]
    found = sorted(silent)
    with suppress(RuntimeError):
        _line().set("gone", json.dumps(found))
    if os.environ["RANK"] == "0":
        time.sleep(HEARD)  # it may keep the store, by which the others are told
    return found


def gathered(value: Any) -> list[Any]:
    """What every process has to say, in their order; anything that JSON can hold."""
    if size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    distributed.all_gather(lengths, torch.tensor([len(data)]))
    longest = int(max(lengths))
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size())]
    distributed.all_gather(rows, nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]


def summed(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if size() > 1:
        distributed.all_reduce(x)
    return x


@dataclass(frozen=True)
class Groups:
    """How processes stand: `each` of them side by side have the same samples and compute some things together.

    Of what all in a group know one of them tells.
    """

    each: int = 1

    @property
    def rank(self) -> int:
        """The number of this process's group, from 0."""
        return rank() // self.each

    @property
    def size(self) -> int:
        """How many groups there are."""
        return size() // self.each

    @property
    def place(self) -> int:
        """The number of this process in its group, from 0."""
        return rank() % self.each

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all groups of a tensor that is the same within one, in place."""
        return summed(x.zero_() if self.place else x)


@dataclass(frozen=True)
class Peers:
    """The processes that have parts of the same micro-batches, all as large, in the order of their parts.

    rank: the number of this process's part, from 0; size: how many there are.
    """

    rank: int = 0
    size: int = 1
    group: distributed.ProcessGroup | None = None

    def gathered(self, x: Tensor) -> Tensor:
        """Rows [n, ...] of every part as one [size * n, ...]; their gradients go back to where each came from."""
        if self.size == 1:
            return x
        whole: Tensor = _Gathered.apply(x, self)  # type: ignore[no-untyped-call]
        return whole

    def most(self, number: int) -> int:
        """The largest number that one of them has."""
        return number if self.size == 1 else most(number, self.group)


class _Gathered(torch.autograd.Function):
    """Rows of all peers; backwards the sum of what all of them make of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, x = peers, x.contiguous()
        rows = [torch.empty_like(x) for _ in range(peers.size)]
        distributed.all_gather(rows, x, group=peers.group)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.peers.group)
        return total.chunk(ctx.peers.size)[ctx.peers.rank], None


def peers(groups: Groups, lanes: int) -> Peers:
    """Those with parts of this process's micro-batches, which so many lanes of groups take in turn.

    All processes have to ask for them at once.
    """
    parts = groups.size // lanes
    if parts == 1:
        return Peers()
    members = [
        [(part * lanes + lane) * groups.each + place for part in range(parts)]
        for lane in range(lanes)
        for place in range(groups.each)
    ]
    mine, _ = distributed.new_subgroups_by_enumeration(members, timeout=TIMEOUT)
    return Peers(groups.rank // lanes, parts, mine)


def most(number: int, group: distributed.ProcessGroup | None = None) -> int:
    """The largest number that a process has, of all or of a group."""
    if size() == 1:
        return number
    found = torch.tensor(number)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    return int(found)


def led(work: Callable[[], Any]) -> None:
    """Let the first process do something while the others wait; where it fails it says why, and all end."""
    if first():
        try:
            work()
        except BaseException as error:
            gathered(getattr(error, "exit_code", 1))
            raise
    code = gathered(0)[0]
    if code:
        sys.exit(code)


def together(work: Callable[[], T]) -> list[T]:
    """What some work on files gives on every process; where it fails on one, each has an OSError."""
    found: T | None = None
    failed: list[Any] | None = None
    try:
        found = work()
    except OSError as error:
        if size() == 1:
            raise
        failed = [error.errno, error.strerror, error.filename]
    every = gathered([found, failed])
    for _, error in every:
        if error is not None:
            raise OSError(*error)
    return [each for each, _ in every]


def share_gradients(
    parameters: Mapping[str, nn.Parameter], present: Collection[str], groups: Groups = Groups()
) -> None:
    """Give every process the sum of all gradients; a parameter that none of them used has none.

    present: those that got one here. Shards have been summed on the way (`training.sharding`), all others are now, and
    those that only others used take part with zeros, or the others would wait for ever.
    """
    if size() == 1:
        return
    there = summed(torch.tensor([int(name in present) for name in parameters])).tolist()
    bucket: list[nn.Parameter] = []
    for count, parameter in zip(there, parameters.values(), strict=True):
        if not count:
            parameter.grad = None
        elif not isinstance(parameter, DTensor):
            bucket.append(parameter)
            if sum(p.numel() for p in bucket) >= BUCKET:
                _sum_bucket(bucket, groups)
                bucket = []
    if bucket:
        _sum_bucket(bucket, groups)


def _sum_bucket(bucket: list[nn.Parameter], groups: Groups) -> None:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    flat = groups.summed(torch.cat([grad.flatten() for grad in grads]))
    for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
        parameter.grad = part.view_as(parameter)
