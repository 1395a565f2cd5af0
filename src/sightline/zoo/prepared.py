"""A model as it is run: the same weights in one precision, joined and packed; the model itself stays as it was."""

from typing import TypeVar

import torch
from torch import nn

from ..core.errors import ConfigError
from ..language.decoder import Decoder
from ..language.stepper import Stepper
from ..layers import native
from ..layers.adapted import merged_state
from ..layers.packed import Precision, pack
from .hollow import hollow

M = TypeVar("M", bound=nn.Module)

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """What weights are kept in; ConfigError tells the precisions there are."""
    if precision not in DTYPES:
        raise ConfigError(f"unknown precision {precision!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def prepared(model: M, precision: Precision = "fp32") -> M:
    """A twin of a VLM, a decoder or an encoder for inference only; it gives no gradients and cannot be saved.

    Adapters are merged into the weights that they stand beside.

    fp32 and bf16 are the precision of weights and activations. int8 is bf16 whose decoder keeps a second copy of its
    weights in int8, read when a token or a few are written: 3 bytes a weight.
    """
    dtype = dtype_of(precision)
    with hollow():
        twin: M = type(model)(model.config)
    twin.load_state_dict({name: t.to(dtype) for name, t in merged_state(model).items()}, assign=True)
    for decoder in [module for module in twin.modules() if isinstance(module, Decoder)]:
        if decoder.head is None:  # tied: the table is read by row, the head as a product
            decoder.head = nn.Linear(decoder.config.width, decoder.config.vocab_size, bias=False, device="meta")
            decoder.head.weight = decoder.embedding.weight
        if Stepper.fits(decoder):
            decoder.stepper = Stepper(decoder, int8=precision == "int8")
        elif precision != "fp32" and decoder.embedding.weight.device.type == "cpu":
            decoder.kept = torch.float32  # which torch attends to faster than to bfloat16 where queries are few
    pack(twin, native.worth_it(twin))
    return twin.eval().requires_grad_(False)
