"""Questions about pictures with short answers: VQA v2 and OK-VQA, TextVQA, GQA."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...core.errors import DataError
from ...core.sequence import Text
from .base import Files, Reader, Record, asked, by_id, checked, load, only, take, text


class Asked(Reader):
    """A reader whose rows are in memory, each under a key."""

    rows: Sequence[tuple[Any, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.files.path}:{self.rows[index][0]}"

    def record(self, picture: str, question: Any, answer: Any) -> Record:
        """A question about the picture of this name, and its answer."""
        words, said = text(question, "the question"), text(answer, "the answer")
        return Record(asked((self.picture(picture), self.question(words)), Text(said)))


class VQA(Asked):
    """VQA v2 and OK-VQA: a file of `questions`, and one of `annotations`.

    Pictures are named after COCO's, `COCO_train2014_000000000001.jpg`, and lie in the folder or in `train2014` in it.
    The answer is the one that most people gave.
    """

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        content = load(files.path, "questions")
        self.subset = str(content.get("data_subtype", "train2014"))
        self.rows = keyed(content["questions"])
        self.answers = by_id(load(files.annotations, "annotations")["annotations"], "question_id")

    def read(self, index: int) -> Record:
        key, row = self.rows[index]
        file = f"COCO_{self.subset}_{take(row, 'image_id', int):012d}.jpg"
        below = f"{self.subset}/{file}"
        said = only(self.answers, key, "annotation with the question_id")
        answer = said.get("multiple_choice_answer")
        if answer is None:
            answer = most_said([take(each, "answer", str) for each in take(said, "answers", list)])
        return self.record(below if self.inside(below).exists() else file, row.get("question"), answer)


class TextVQA(Asked):
    """TextVQA: `data` with questions and ten answers each; pictures are `IMAGE_ID.jpg`."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self.rows = keyed(load(files.path, "data")["data"])

    def read(self, index: int) -> Record:
        row = self.rows[index][1]
        answer = most_said([text(each, "an answer") for each in take(row, "answers", list)])
        return self.record(f"{take(row, 'image_id', str)}.jpg", row.get("question"), answer)


class GQA(Asked):
    """GQA: one object whose keys are question ids; pictures are `imageId.jpg`, answers a word or two."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        content = load(files.path)
        if not isinstance(content, dict):
            raise DataError(f"{files.path}: expected an object of questions")
        self.rows = list(content.items())

    def read(self, index: int) -> Record:
        row = checked(self.rows[index][1], dict, "the question")
        return self.record(f"{take(row, 'imageId', str)}.jpg", row.get("question"), row.get("answer"))


def keyed(rows: list[Any]) -> list[tuple[Any, Any]]:
    """Rows under their `question_id`, or where they have none under their number."""
    keys = [row.get("question_id") if isinstance(row, dict) else None for row in rows]
    return [(f"[{i}]" if key is None else key, row) for i, (key, row) in enumerate(zip(keys, rows, strict=True))]


def most_said(answers: list[str]) -> str:
    """The answer that most people gave, of several the one that came first."""
    if not answers:
        raise DataError("no answers")
    return Counter(answers).most_common(1)[0][0]
