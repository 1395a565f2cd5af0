"""How well a model reads scenes of unseen seeds, by kind of question, with and without the right picture.

Controls stand beside each score: a blank picture and another scene's, with which a model that looks must fall to the
question's prior; and a talk, where each question comes after others about the picture, with their right answers.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import PIL.Image

from ..core.geometry import Box, Frame, Point, match
from ..core.sequence import Conversation, Image, Message, Text, ask
from ..grounding.codecs import Grounded
from ..training.sources import dialogue
from ..worlds.scene_questions import Question, questions
from ..worlds.scenes import Scene, SceneConfig, scene

Control = Literal["real", "blank", "shuffled", "talk"]
FIRST_SEED = 900_000_000  # far from every seed that training asks for
ANY = SceneConfig()
REACH = 8 / 128  # how far a point may be off, as a share of the picture's shorter side


class Answers(Protocol):
    """What evaluation asks of an engine."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[Grounded]:
        """One answer per conversation, in order."""
        ...


@dataclass(frozen=True)
class Item:
    """A question with the scene it is about, of which world that is, and the group its score goes to.

    before: questions about the same scene that may come first.
    """

    number: int
    question: Question
    frame: Frame
    group: str
    world: SceneConfig = ANY
    before: tuple[Question, ...] = ()


@dataclass
class Score:
    """Right answers of how many; boxes found of how many at IoU 0.5."""

    right: int = 0
    total: int = 0
    found: int = 0
    boxes: int = 0

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else 0.0


@dataclass
class Report:
    """Scores by group, and of all."""

    groups: dict[str, Score] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """Right answers of all questions."""
        total = sum(score.total for score in self.groups.values())
        return sum(score.right for score in self.groups.values()) / total if total else 0.0

    @property
    def boxes(self) -> float:
        """Boxes found at IoU 0.5 of all that were asked for."""
        asked = sum(score.boxes for score in self.groups.values())
        return sum(score.found for score in self.groups.values()) / asked if asked else 0.0

    def to_dict(self) -> dict[str, float]:
        rows = {name: round(score.share, 4) for name, score in sorted(self.groups.items())}
        return {"overall": round(self.overall, 4), "boxes at IoU 0.5": round(self.boxes, 4), **rows}


Asking = Callable[[Scene, random.Random, int], list[Question]]


def items(
    count: int, turns: int = 4, first: int = FIRST_SEED, world: SceneConfig = ANY, asking: Asking = questions
) -> Iterator[Item]:
    """`count` questions about scenes of seeds from `first` on; asking: makes some about a scene."""
    made, seed = 0, first
    while made < count:
        picture = scene(seed, world)
        asked = asking(picture, random.Random(seed), turns)[: count - made]
        for i, question in enumerate(asked):
            yield Item(seed, question, Frame(*picture.size), group(question), world, tuple(asked[:i]))
        made += len(asked)
        seed += 1


def group(question: Question) -> str:
    """The group of a question: its kind, with counts of 1 to 6 and the four directions apart."""
    if question.kind == "count":
        return "count 1-6" if question.answer in ["1", "2", "3", "4", "5", "6"] else "count other"
    if question.kind == "relation":
        directed = question.meta.get("form") in ("direct", "either", "some")
        return "left/right/above/below" if directed else "relation other"
    return question.kind


def picture_of(item: Item, control: Control) -> Image:
    """The picture that a control shows."""
    if control == "blank":
        return Image(PIL.Image.new("RGB", (int(item.frame.width), int(item.frame.height)), (128, 128, 128)))
    return Image(scene(item.number + 500_009 * (control == "shuffled"), item.world).picture())


def conversation(item: Item, picture: Image, control: Control) -> Conversation:
    """What is asked of a model."""
    if control != "talk" or not item.before:
        return ask(item.question.text, picture)
    return (*dialogue(list(item.before), item.frame, picture), Message("user", (Text(item.question.text),)))


def score(item: Item, answer: Grounded, into: Score) -> None:
    """Count one answer: exact words, all boxes at IoU 0.5 and no other, every point near its place."""
    question = item.question
    into.total += 1
    if question.boxes:
        truth = [Box(*map(float, box), item.frame) for _, box in question.boxes]
        pairs = match(answer.boxes, truth)
        into.boxes += len(truth)
        into.found += len(pairs)
        into.right += len(pairs) == len(truth) == len(answer.boxes)
    elif question.points:
        truth_points = [Point(float(x), float(y), item.frame) for _, (x, y) in question.points]
        into.right += _near(answer.points, truth_points, REACH * min(item.frame.width, item.frame.height))
    else:
        into.right += answer.text.strip().lower() == question.answer


def _near(found: Sequence[Point], truth: Sequence[Point], reach: float) -> bool:
    """Whether every true point has a found one of its own within `reach` pixels, and none is left over."""
    left = list(found)
    for point in truth:
        close = [p for p in left if (p.x - point.x) ** 2 + (p.y - point.y) ** 2 <= reach**2]
        if not close:
            return False
        left.remove(close[0])
    return not left


def evaluate(
    answers: Answers,
    count: int = 2000,
    control: Control = "real",
    first: int = FIRST_SEED,
    world: SceneConfig = ANY,
    asking: Asking = questions,
) -> Report:
    """Ask `count` questions and score them; `answers` is called with about 64 at a time."""
    report = Report()
    asked = list(items(count, first=first, world=world, asking=asking))
    shown: dict[int, Image] = {}
    for start in range(0, len(asked), 64):
        chunk = asked[start : start + 64]
        for item in chunk:
            if item.number not in shown:
                shown[item.number] = picture_of(item, control)
        found = answers([conversation(item, shown[item.number], control) for item in chunk])
        for item, answer in zip(chunk, found, strict=True):
            score(item, answer, report.groups.setdefault(item.group, Score()))
        shown = {number: image for number, image in shown.items() if number >= chunk[-1].number}
    return report
