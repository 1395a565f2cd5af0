"""What benchmarks share: the two shapes in transformers and here from the same weights, fair timing, dated results."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from sightline.model import VLM
from sightline.zoo import llava

HERE = Path(__file__).parent
IMAGE_TOKEN = 5
SLOTS = 196

SHAPES: dict[str, dict[str, Any]] = {
    "micro": {
        "vision": hf.CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
            image_size=224, patch_size=16,
        ),
        "text": hf.LlamaConfig(
            vocab_size=4096, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
            num_key_value_heads=5, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        ),
        "strategy": "default",
    },
    "small": {
        "vision": hf.SiglipVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=16,
        ),
        "text": hf.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
        ),
        "strategy": "full",
    },
}  # fmt: skip


def pair(shape: str) -> tuple[Any, VLM]:
    """The same weights as transformers' LLaVA and as ours, float32."""
    torch.manual_seed(0)
    parts = SHAPES[shape]
    config = hf.LlavaConfig(
        vision_config=parts["vision"],
        text_config=parts["text"],
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=parts["strategy"],
        vision_feature_layer=-1 if parts["strategy"] == "full" else -2,
        tie_word_embeddings=True,
    )
    theirs = hf.LlavaForConditionalGeneration(config).eval()
    settings = llava.config(config.to_dict() | {"text_config": {**config.text_config.to_dict()}})
    ours = VLM(settings).eval()
    state = {k: v.clone() for k, v in llava.published(theirs.state_dict()).items()}
    tower = {k for k in state if k.startswith("vision_tower.vision_model.head.")}
    ours.load_state_dict(llava.keys(settings).load({k: v for k, v in state.items() if k not in tower}))
    return theirs, ours


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that whatever else the machine does falls on all of them."""
    for run in list(runs.values()) * warm:
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return found


def summary(times: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, in milliseconds."""
    ordered = sorted(times)
    pick = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {
        "median_ms": round(1e3 * statistics.median(ordered), 3),
        "p10_ms": round(1e3 * pick(0.1), 3),
        "p90_ms": round(1e3 * pick(0.9), 3),
    }


def write(name: str, rows: Any) -> Path:
    """Keep a result beside what it was measured with: benchmarks/results/NAME-DATE.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.strip(),
        "machine": model[0].split(":", 1)[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": hf.__version__,
        "rows": rows,
    }
    path = HERE / "results" / f"{name}-{result['date']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return path
