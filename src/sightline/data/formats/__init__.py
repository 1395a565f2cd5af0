"""Readers of published data sets: conversations by their number, each checked before it is believed."""

from ...core.config import nearest
from ...core.errors import ConfigError, DataError
from .base import Files, Reader, Record
from .boxes import Coco, RefCoco
from .captions import captions_of
from .conversations import Llava, OpenAI
from .preferences import LlavaPairs, OpenAIPairs, RlhfV, VLFeedback
from .questions import GQA, VQA, TextVQA
from .shards import Shards

__all__ = ["FORMATS", "PREFERENCES", "Files", "Reader", "Record", "captions_of", "open_files"]

FORMATS: dict[str, type[Reader]] = {
    "llava": Llava,
    "openai": OpenAI,
    "shards": Shards,
    "vqa": VQA,
    "textvqa": TextVQA,
    "gqa": GQA,
    "coco": Coco,
    "refcoco": RefCoco,
    "rlhf-v": RlhfV,
    "vlfeedback": VLFeedback,
    "llava-pairs": LlavaPairs,
    "openai-pairs": OpenAIPairs,
}
PREFERENCES = ("rlhf-v", "vlfeedback", "llava-pairs", "openai-pairs")  # whose samples are pairs of answers


def open_files(format: str, files: Files) -> Reader:
    """The reader of a data set; ConfigError tells the nearest format, DataError a file that cannot be read."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    reader = FORMATS[format](files)
    if not len(reader):
        raise DataError(f"{files.path}: no samples in it")
    return reader
