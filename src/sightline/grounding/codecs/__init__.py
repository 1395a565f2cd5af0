r"""Regions to a family's own text and back; what comes back is in pixels of the original picture.

| codec | text | frame of its numbers |
|---|---|---|
| `LocationTokens` | `red circle<box><loc012><loc034><loc056><loc078>`, `<point>...` | 128 bins of the model's picture |
| `Decimals` | `[0.123,0.456,0.789,0.999]`, joined by `;`, points `[x,y]` | share of the padded square |
| `PaliGemmaLocations` | `<loc0102><loc0204><loc0306><loc0408> cat ; ...` | 1024 bins, top first |
| `Kosmos2Patches` | `<phrase> cat</phrase><object><patch_index_0044><patch_index_0863></object>` | 32 x 32 cells |
| `QwenVLBoxes` | `<ref>cat</ref><box>(102,204),(306,408)</box>` | 999ths of the original |
| `Qwen2VLBoxes` | the same, its tags `object_ref_start`, `box_start` and so on | thousandths of the original |
| `Qwen25VLJson` | `[{"bbox_2d": [102, 204, 306, 408], "label": "cat"}]`, points `point_2d` | pixels the model sees |
| `InternVLBoxes` | `<ref>cat</ref><box>[[102, 204, 306, 408]]</box>` | thousandths of the original |
| `FerretNumbers` | `cat [102, 204, 306, 408]`, points `[x, y]` | thousandths of the original, rounded down |
| `CogVLMBoxes` | `[[102,204,306,408]]`, joined by `;` | thousandths of the original |
| `MolmoPoints` | `<point x="10.2" y="20.4" alt="cat">cat</point>` | percent of the original |
"""

from .base import Codec, Grounded, Place
from .cogvlm import CogVLMBoxes
from .decimals import Decimals, ShikraDecimals
from .ferret import FerretNumbers
from .internvl import InternVLBoxes
from .kosmos2 import Kosmos2Patches
from .location_tokens import LocationTokens
from .molmo import MolmoPoints
from .paligemma import PaliGemmaLocations
from .qwen_vl import Qwen2VLBoxes, Qwen25VLJson, QwenVLBoxes, QwenVLChatBoxes

CODECS: dict[str, Codec] = {
    "location-tokens": LocationTokens(),
    "decimals": Decimals(),
    "shikra": ShikraDecimals(),
    "paligemma": PaliGemmaLocations(),
    "kosmos-2": Kosmos2Patches(),
    "qwen-vl": QwenVLBoxes(),
    "qwen-vl-chat": QwenVLChatBoxes(),
    "qwen2-vl": Qwen2VLBoxes(),
    "qwen2.5-vl": Qwen25VLJson(),
    "internvl": InternVLBoxes(),
    "ferret": FerretNumbers(),
    "cogvlm": CogVLMBoxes(),
    "molmo": MolmoPoints(),
}

__all__ = [
    "CODECS",
    "Codec",
    "CogVLMBoxes",
    "Decimals",
    "FerretNumbers",
    "Grounded",
    "InternVLBoxes",
    "Kosmos2Patches",
    "LocationTokens",
    "MolmoPoints",
    "PaliGemmaLocations",
    "Place",
    "Qwen2VLBoxes",
    "Qwen25VLJson",
    "QwenVLBoxes",
    "QwenVLChatBoxes",
    "ShikraDecimals",
]
