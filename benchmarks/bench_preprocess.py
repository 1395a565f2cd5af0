"""A 640x480 JPEG to pixels of 3x224x224 on one thread, against transformers' CLIP processor (its Pillow path).

Both start from the encoded bytes. The claims: at least 2.2x the pictures a second, within one level of 255.

    python benchmarks/bench_preprocess.py [--rounds 12]
"""

import argparse
import io
import statistics

import numpy as np
import PIL.Image
import torch
import transformers as hf
from common import interleaved, write

from sightline.data.images import CLIP_STD, CenterCrop
from sightline.data.media import open_image

PICTURES = 12


def jpeg(seed: int) -> bytes:
    """A picture with smooth and sharp parts, encoded at quality 90 into about 80 kB."""
    rng = np.random.default_rng(seed)
    smooth = PIL.Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
    noise = rng.normal(0, 12, (480, 640, 3))
    picture = np.clip(np.asarray(smooth) + noise * (rng.random((480, 640, 1)) < 0.5), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(picture).save(out, "JPEG", quality=90)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dry", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [jpeg(seed) for seed in range(PICTURES)]
    theirs = hf.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    ours = CenterCrop(224, 224)

    def hf_pixels(data: bytes) -> torch.Tensor:
        pixels: torch.Tensor = theirs(PIL.Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
        return pixels

    def our_pixels(data: bytes) -> torch.Tensor:
        return ours(open_image(data).picture)[0]

    levels = max(
        float(((hf_pixels(data) - our_pixels(data)).abs() * torch.tensor(CLIP_STD)[:, None, None]).max() * 255)
        for data in files
    )
    times = interleaved(
        {
            "transformers": lambda: [hf_pixels(data) for data in files],
            "sightline": lambda: [our_pixels(data) for data in files],
        },
        args.rounds,
    )
    speed = {name: round(PICTURES / statistics.median(seconds), 1) for name, seconds in times.items()}
    ratio = round(speed["sightline"] / speed["transformers"], 3)
    result = {
        "kilobytes": round(sum(map(len, files)) / PICTURES / 1000, 1),
        "pictures_per_second": speed,
        "ratio": ratio,
        "largest_difference_in_levels": round(levels, 3),
        "claims": {"at least 2.2x": ratio >= 2.2, "within one level": levels <= 1.01},
    }
    print(result)
    if not args.dry:
        print("written to", write("preprocess", result))


if __name__ == "__main__":
    main()
