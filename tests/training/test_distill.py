"""DINO by hand, its slow teacher, its centre, and its crops."""

from dataclasses import replace

import pytest
import torch

from sightline.data.batch import Batch
from sightline.language.tokenizer import Tokenizer
from sightline.model import VLM
from sightline.training.distill import DINO, crop, dino_loss
from sightline.training.loader import Batches
from sightline.training.recipe import Recipe
from sightline.training.run import initial_model, processor_of
from sightline.training.settings import DINOConfig

CFG = DINOConfig(prototypes=12, bottleneck=6, local_crops=2, momentum=0.9, center_momentum=0.8)


@pytest.fixture
def setup(recipe: Recipe, tokenizer: Tokenizer) -> tuple[VLM, DINO, list[Batch]]:
    model = initial_model(recipe)
    stage = replace(recipe.stages[0], batch=3, objective={"dino": 1.0})
    data = Batches(stage, 0, 0, recipe.sources, processor_of(recipe, tokenizer, model))
    torch.manual_seed(0)
    return model, DINO(model.encoder, CFG), [data[0], data[1]]


def test_every_crop_is_told_what_the_teacher_says_of_another() -> None:
    student, target = torch.randn(4, 3, 5), torch.randn(2, 3, 5).softmax(-1)
    wanted = torch.zeros(())
    pairs = 0
    for t in range(2):
        for s in range(4):
            if s != t:
                wanted = wanted - (target[t] * (student[s] / 0.2).log_softmax(-1)).sum()
                pairs += 1
    total, count = dino_loss(student, target, 0.2)
    torch.testing.assert_close(total, wanted / pairs)
    assert (pairs, count) == (6, 3)


def test_the_teacher_follows_slowly_and_is_centred_and_sharp(setup: tuple[VLM, DINO, list[Batch]]) -> None:
    model, objective, micro = setup
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in [*model.encoder.parameters(), *objective.head.parameters()]:
            parameter.add_(torch.randn_like(parameter))
        objective.center.copy_(torch.randn(12))
    center = objective.center.clone()
    first, second = objective.prepare(model, micro, "")
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(objective.teacher.state_dict()[name], 0.9 * before[name] + 0.1 * value)
    said = [
        torch.stack([objective.teacher_head(objective.teacher(view)) for view in batch.extra["views"][:2]])
        for batch in (first, second)
    ]
    torch.testing.assert_close(first.extra["target"], ((said[0] - center) / 0.04).softmax(-1))
    torch.testing.assert_close(objective.center, 0.8 * center + 0.2 * torch.cat(said, 1).mean((0, 1)))
    assert objective.counts(first) == {"dino": 3}


def test_the_student_learns_and_the_teacher_does_not(setup: tuple[VLM, DINO, list[Batch]]) -> None:
    model, objective, micro = setup
    (batch,) = objective.prepare(model, micro[:1], "")
    total, count = objective(model, batch)["dino"]
    total.backward()
    assert count == 3
    assert {name.split(".")[0] for name, p in objective.named_parameters() if p.grad is not None} == {"head"}
    assert model.encoder.patch.weight.grad is not None
    assert not any(p.requires_grad for p in [*objective.teacher.parameters(), *objective.teacher_head.parameters()])
    assert {"center", "teacher.positions"} < set(objective.state_dict())


def test_crops_are_windows_of_their_own_picture(setup: tuple[VLM, DINO, list[Batch]]) -> None:
    _, objective, micro = setup
    assert micro[0].patches is not None
    views = objective.views(micro[0].patches)
    assert [view.grids for view in views] == [((1, 2, 2),) * 3] * 2 + [((1, 1, 1),) * 3] * 2
    torch.manual_seed(0)
    flat = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    spread = crop(flat, (0.1, 0.4), 16).flatten(1)
    assert spread.shape[1] == 3 * 16 * 16 and float(spread.std(1).max()) < 1e-5  # one colour stays one
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    seen = crop(ramp, (0.25, 0.25), 32)[:, 0]
    slope = (seen[..., -1] - seen[..., 0]).mean(1)
    assert 0.3 < float((slope > 0).float().mean()) < 0.7  # half of them are turned over
    assert 0.35 < float(slope.abs().mean()) < 0.6  # about half of the width at a quarter of the area
