"""The command line: parses, calls, prints. Everything of weight is imported inside the verb that needs it."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from . import __version__
from .core.errors import InputError, SightlineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .serving.talker import Answer, Talker


class Verbs(TyperGroup):
    """The verbs, whose errors are one line on stderr and an exit code."""

    def main(self, *args: Any, **more: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**more, "standalone_mode": False})
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
                raise  # a run that was asked to stop
            # nobody reads on, as after `| head`, at which the parser exits: no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except SightlineError as error:
            fail(str(error), error.exit_code)
        except typer.Abort:
            fail("interrupted", 130)
        except OSError as error:
            fail(f"{error.filename or 'writing'}: {(error.strerror or str(error)).lower()}")
        except MemoryError:
            fail("out of memory")
        except Exception as error:
            if not hasattr(error, "format_message"):  # what typer and its parser raise for a wrong command line
                raise
            fail(error.format_message())
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, whatever the message holds, and the end."""
    which = f" of process {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
    sys.stderr.write(f"error{which}: {' '.join(clean(message).split())}\n")  # at once: other processes write as well
    sys.exit(code)


def clean(text: str) -> str:
    """Text that cannot steer a terminal: what is neither printable nor a line break becomes a space."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A name that `models` lists, a folder, or openai:NAME, gemini:NAME.")
]
InPrecision = Annotated[str, typer.Option("--precision", help="fp32, bf16 or int8.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, above 0 draws.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")]
Seed = Annotated[int, typer.Option(help="What is drawn is the same for the same seed.")]
Stop = Annotated[list[str] | None, typer.Option(help="End an answer at this text; may be given several times.")]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Ask about pictures, get answers in words, boxes and points."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def ask(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures (- is stdin), a question.")],
    model: Model = None,
    precision: InPrecision = "fp32",
    as_json: AsJson = False,
    draw: Annotated[Path | None, typer.Option(help="Write the picture with the answer's places drawn on it.")] = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Answer a question about pictures."""
    *paths, question = words
    if not paths:
        raise InputError(f"found only {question[:60]!r}, expected a picture and a question")
    from .core.sequence import images_of
    from .data.draw import check_drawing, draw_places
    from .serving.talker import conversation

    talk = conversation([_picture(path) for path in paths], question)
    if draw is not None:
        check_drawing(draw, images_of(talk)[-1].picture.size)
    settings = _settings(max_tokens, temperature, top_p, seed, stop)
    answer = _spoken(_talker(model, precision), talk, settings, quiet=as_json)
    if as_json:
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
    if draw is not None:
        draw_places(images_of(talk)[-1].picture, answer.boxes, answer.points).save(draw)


@app.command()
def chat(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures to talk about.")],
    model: Model = None,
    precision: InPrecision = "fp32",
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Talk about pictures, turn by turn; an empty line or the end of input ends it."""
    from .core.sequence import Conversation, Message, Text, images_of
    from .serving.talker import pictures

    first = pictures(images)
    assistant = _talker(model, precision)
    settings = _settings(max_tokens, temperature, top_p, seed, stop)
    talk: Conversation = ()
    while question := _asked():
        turn = (*talk, Message("user", (*(() if talk else first), Text(question))))
        answer = _spoken(assistant, turn, settings)
        talk = (*turn, assistant.said(answer, max(0, len(images_of(turn)) - 1)))


@app.command()
def answer(
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS.jsonl", help='Rows {"image", "question", ...}.')],
    out: Annotated[Path, typer.Option(help="Rows with their answers; a run that was stopped goes on.")],
    model: Model = None,
    precision: InPrecision = "fp32",
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
) -> None:
    """Answer a file of questions, in batches."""
    from .serving.answers import answer_file
    from .serving.sampling import Sampling

    sampling = Sampling(**_settings(max_tokens, temperature, top_p, seed, stop))
    with _progress("answering") as progress:
        done = answer_file(_talker(model, precision), questions, out, sampling, progress)
    before = f", {done.skipped} were there before" if done.skipped else ""
    _tell(f"{out}: {done.rows} rows{before}, {done.errors} with an error")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List what can be loaded: what it is made of, where it is from, how that was proven, whether it is here."""
    from .zoo.catalogue import listed

    rows = listed()
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
        return
    room = max(len(row.name) for row in rows)
    for row in rows:
        print("\n".join(row.lines(room)))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A published model that `models` lists.")],
    folder: Annotated[Path | None, typer.Option(help="Where to; without it a cache that NAME is looked up in.")] = None,
) -> None:
    """Bring the weights of a published model from the hub; a pull that was stopped goes on."""
    from .zoo.pull import origin, pull as bring

    with _progress("pulling", data=True) as progress:
        where = bring(name, folder, progress)
    print(where)
    _tell(origin(where))


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="A name that `models` lists, or a folder.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Of a picture, such as 1344x896.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a model's pipeline with its shapes and costs; no weights are needed."""
    from .zoo.names import describe_named

    description = describe_named(name, None if size is None else _sides(size))
    print(json.dumps(description.to_dict()) if as_json else "\n".join(description.lines()))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A name that `models` lists, or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str | None, typer.Option(help="sightline, or llava, which transformers and engines read.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in OUT.")] = False,
) -> None:
    """Write a model in another layout: ours as LLaVA's, those of others as ours."""
    from .zoo.convert import convert as write
    from .zoo.names import locate

    print(write(locate(source), out, to, force))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="tiny, sightline-mini, a published model's, or a YAML or JSON file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="stages.1.steps=20")] = None,
    stage: Annotated[str | None, typer.Option(help="Only this stage.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the run lies; runs/RECIPE without it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Each process of torchrun keeps a part of the model.")] = False,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="How many processes compute each block of a decoder in shards together.")
    ] = 1,
    world: Annotated[int, typer.Option(min=1, help="With --dry-run: what each of so many processes takes.")] = 1,
) -> None:
    """Train a recipe, or one stage of it; a run that was stopped goes on."""
    from .core.config import override
    from .recipes import recipe as named
    from .training.pace import Pace

    chosen = override(named(recipe), overrides or [])
    if dry_run:
        from .training.plan import plan

        print("\n".join(plan(chosen, stage, world=world, shard=shard, tensor_parallel=tensor_parallel)))
        return
    if world > 1:
        raise InputError("--world is for --dry-run; to train on several processes start them with torchrun")
    from .training import distributed
    from .training.export import export
    from .training.run import run

    where = folder or Path("runs") / chosen.name
    pace = Pace(chosen)
    with distributed.joined(), _progress("training", quiet=not distributed.first()) as progress:
        first = distributed.first()
        for step in run(chosen, where, stage, distributed.device(), shard=shard, tensor_parallel=tensor_parallel):
            progress(step.step, chosen.stages[chosen.stage(step.stage)].steps, pace.note(step))
    if first:
        print(export(chosen, where, where / "model"))
        _tell(f"{where}: report.html, metrics.jsonl")


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="The name of a recipe, or a YAML or JSON file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="stages.0.steps=200")] = None,
    fusion: Annotated[str, typer.Option(help="Which, with commas between them; the first is the yardstick.")] = (
        "linear,mlp,qformer,resampler,cross-attention,expert,native"
    ),
    seeds: Annotated[int, typer.Option(help="How often each is trained.")] = 3,
    questions: Annotated[int, typer.Option(help="How many questions each is asked.")] = 400,
    folder: Annotated[Path | None, typer.Option(help="Where it lies; runs/RECIPE-fusions without it.")] = None,
) -> None:
    """Train a recipe with one fusion after another and compare them; what was stopped goes on."""
    from .core.config import override
    from .evaluation.comparing import compare
    from .recipes import recipe as named

    chosen = override(named(recipe), overrides or [])
    where = folder or Path("runs") / f"{chosen.name}-fusions"
    with _progress("comparing") as progress:
        found = compare(chosen, fusion.split(","), where, seeds, questions, progress)
    print(found.markdown())
    _tell(f"{where}: comparison.md, comparison.json, comparison.svg")


@app.command()
def render(
    world: Annotated[str, typer.Argument(help="scenes")],
    count: Annotated[int, typer.Option(help="How many pictures.")] = 100,
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("scenes"),
    seed: Seed = 0,
) -> None:
    """Write a synthetic world's pictures with questions and exact answers."""
    from .worlds.render import world_named

    write = world_named(world)
    with _progress("rendering") as progress:
        print(write(out, count, seed, progress=progress))


# ------------------------------------------------------------------------------------------------------------ in, out


def _settings(max_tokens: int, temperature: float, top_p: float, seed: int, stop: list[str] | None) -> dict[str, Any]:
    """The options of sampling under the names that `Sampling` has for them."""
    return {
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }


def _sides(size: str) -> tuple[int, int]:
    """Width and height of `1344x896`."""
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"a size of {size!r}, expected width and height such as 1344x896")
    return int(width), int(height)


def _picture(path: str) -> str | bytes:
    """A path, or for `-` the bytes of stdin."""
    if path != "-":
        return path
    if not (data := sys.stdin.buffer.read()):
        raise InputError("stdin is empty, expected the bytes of a picture")
    return data


def _asked() -> str:
    """The next line that a person types; empty at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _talker(name: str | None, precision: str) -> "Talker":
    """The model of this name, here or behind somebody's API."""
    from .serving.remote import is_remote, reach

    if name is not None and is_remote(name):
        return reach(name)
    from .serving.assistant import load

    return load(name, precision)  # type: ignore[arg-type]  # which refuses what is no precision


def _spoken(talker: "Talker", talk: Any, settings: dict[str, Any], quiet: bool = False) -> "Answer":
    """Answer, printing the text as it comes, then its places; what it cost goes to stderr."""
    stream = talker.stream_chat(talk, **settings)
    for piece in stream:
        if not quiet:
            print(clean(piece), end="", flush=True)
    answer = stream.answer
    if not quiet:
        print()
        for line in answer.place_lines():
            print(clean(line))
        _tell(answer.cost_line())
    return answer


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


@contextmanager
def _progress(what: str, data: bool = False, quiet: bool = False) -> "Iterator[Callable[..., None]]":
    """A bar on stderr, or where that is no terminal a line every half minute; neither if it is to be quiet.

    data: whether what is counted are bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counted = DownloadColumn() if data else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeRemainingColumn())
    seen = sys.stderr.isatty()
    told = began = time.monotonic()
    begin = last = -1  # where what is counted began, and was when it was told last
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not seen) as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int, note: str = what) -> None:
            nonlocal told, began, begin, last
            now = time.monotonic()
            if last < 0 or done < last:  # another stage
                began, begin = now, done
            last = done
            bar.update(task, completed=done, total=total, description=note)
            if not quiet and not seen and now - told > 30:
                told = now
                each = (now - began) / (done - begin) if done > begin else 0
                left = f", {timedelta(seconds=round(each * (total - done)))} left" if each else ""
                _tell(f"{note}: {done} of {total}{left}")

        yield progress


def main() -> None:
    """The program `sightline`."""
    warnings.simplefilter("ignore")  # libraries' notes to programmers
    app()
