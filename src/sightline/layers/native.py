"""The C++ kernels of `kernels/`, built once by the machine's own compiler; where there is none, torch does the work."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.folders import user_cache

SOURCE = Path(__file__).parent / "kernels" / "native.cpp"  # it includes the others of its folder
# what -ffast-math allows, without its start-up code, which would switch off tiny numbers in the whole process
LOOSE = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *LOOSE, "-fopenmp", "-shared", "-fPIC", "-std=c++17")
OFF = "SIGHTLINE_NATIVE"  # set to 0 to leave it out
GROUP = 32  # int8 weights of one output that share a scale
LANES = 16
WIDEST_HEAD = 256
MOST_ROWS = 32  # beyond this many rows a product is bound by arithmetic, which oneDNN does better
WORTH = 8_000_000  # weights from which on a model is run by these kernels
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_pointer = ctypes.c_void_p


class Matrix(ctypes.Structure):
    """A weight as the kernels know it."""

    _fields_ = [
        ("data", _pointer), ("scale", _pointer), ("bias", _pointer),
        ("kind", ctypes.c_int64), ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    """The weights of a block and the cache of its keys and values."""

    _fields_ = [
        *[(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, _pointer) for name in ("norm1", "norm2", "key", "value")],
    ]  # fmt: skip


class Step(ctypes.Structure):
    """What is the same for all blocks of a step."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (
            "layers", "batch", "width", "heads", "kv_heads", "dim", "hidden", "activation", "length", "capacity",
            "kept",
        )],
        ("eps", ctypes.c_double),
        *[(name, _pointer) for name in ("cos", "sin", "mask", "norm", "x", "h", "a", "g", "u", "scores")],
    ]  # fmt: skip


class Prompt(ctypes.Structure):
    """A prompt's attention to itself."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "length", "heads", "kv_heads", "dim", "causal")],
        *[(name, _pointer) for name in ("joined", "cos", "sin", "out", "key", "value", "scratch")],
    ]  # fmt: skip


@cache
def library() -> Any:
    """The built kernels, or None: no compiler, one that cannot build them, or switched off."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or os.environ.get(OFF) == "0" or platform.system() == "Windows":
        return None
    try:
        built = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: a user without a home folder
        return None
    built.step.argtypes, built.step.restype = [_pointer, _pointer], None
    built.multiply.argtypes, built.multiply.restype = [_pointer, _pointer, _pointer, ctypes.c_int64], None
    built.prompt.argtypes, built.prompt.restype = [_pointer, ctypes.c_int64], None
    integer = ctypes.c_int64
    built.norm.argtypes, built.norm.restype = [_pointer] * 4 + [integer] * 2 + [ctypes.c_double, integer], None
    built.threads.restype = ctypes.c_int
    return built


def _built(compiler: str) -> Path:
    """The library in the user's cache, under a name that changes with the source and the machine."""
    folder = user_cache()
    sources = [path.read_text() for path in sorted(SOURCE.parent.iterdir()) if path.suffix in (".cpp", ".h")]
    about = "\0".join((*sources, *FLAGS, compiler, torch.__version__, _processor()))
    path = folder / f"native-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *FLAGS, str(SOURCE), "-o", name]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(name, path)  # two processes may build it at once; either's is whole
        finally:
            Path(name).unlink(missing_ok=True)
    return path


def _processor() -> str:
    """What `-march=native` stands for: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def worth_it(model: nn.Module) -> bool:
    """Whether a model is run by these kernels: one on a CPU, large enough that building them once is soon repaid."""
    weights = list(model.parameters())
    here = all(w.device.type == "cpu" and w.dtype in (torch.float32, torch.bfloat16) for w in weights)
    return here and sum(w.numel() for w in weights) >= WORTH and library() is not None


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] scaled to a mean square of one, times the weight [width] in float32."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    library().norm(*map(address, (x, weight, None, out)), x.numel() // width, width, eps, KINDS[x.dtype])
    return out


def self_attention(
    joined: Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    causal: bool,
    rotary: tuple[Tensor, Tensor] | None = None,
    cached: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention of tokens to themselves, rotary positions applied on the way.

    joined: [batch, length, (heads + 2 kv_heads) * dim], queries, keys and values side by side; rotary: [batch or 1, 1,
    length, dim]. Returns what was attended [batch, length, heads * dim] and, for a cache, the turned keys and the
    values [batch, kv_heads, length, dim].
    """
    joined = joined.contiguous()
    batch, length, _ = joined.shape
    tables = [None, None]
    if rotary is not None:
        tables = [t.float().expand(batch, 1, length, dim).contiguous() for t in rotary]
    out = joined.new_empty(batch, length, heads * dim)
    key, value = (joined.new_empty(batch, kv_heads, length, dim) if cached else None for _ in range(2))
    padded = -(-length // 32) * 32
    scratch = torch.empty(2 * padded * dim * batch * kv_heads + library().threads() * 8 * padded)
    tensors = (joined, *tables, out, key, value, scratch)
    prompt = Prompt(batch, length, heads, kv_heads, dim, causal, *map(address, tensors))
    library().prompt(ctypes.byref(prompt), KINDS[joined.dtype])
    return out, key, value


class Weight:
    """A linear map as the kernels read it; `int8` quantises it, 32 weights of an output to a scale (0.5% error)."""

    def __init__(self, linear: nn.Linear, int8: bool = False) -> None:
        weight = linear.weight.detach().contiguous()
        self.scale: Tensor | None = None
        if int8:
            weight, self.scale = quantised(weight)
        self.data, self.outputs, self.inputs = weight, weight.shape[0], weight.shape[1]
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        self.matrix = Matrix(
            address(self.data), address(self.scale), address(self.bias), KINDS[weight.dtype], self.outputs, self.inputs
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] in float32 to [..., outputs]."""
        flat = x.reshape(-1, self.inputs).contiguous()
        out = x.new_empty((len(flat), self.outputs))
        library().multiply(ctypes.byref(self.matrix), flat.data_ptr(), out.data_ptr(), len(flat))
        return out.view(*x.shape[:-1], self.outputs)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether the kernels read a map of these sizes: whole vectors, whole groups."""
        return type(linear) is nn.Linear and linear.in_features % GROUP == 0 and linear.weight.dtype in KINDS


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of -127 to 127 [outputs, inputs] and the scales of their groups [outputs, inputs / 32]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1).clamp(min=1e-12) / 127
    return (groups / scale[..., None]).round().to(torch.int8).flatten(1), scale.contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
