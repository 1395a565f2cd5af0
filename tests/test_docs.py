"""Every code block of the README and of docs/ runs, page by page and in order, in an empty folder.

A page's Python blocks share their names, its shell blocks share the folder. In `console` blocks the lines after `$ `
run. A block after `<!-- no-run: reason -->` is left out, and the reason must be there.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- no-run:(?P<reason>[^\n]*?)-->\n)?^```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, the line it starts at, and why it is not run, if it is not."""

    kind: str
    code: str
    line: int
    reason: str | None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page that name a language."""
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["kind"], found["code"], line, found["reason"])


def shell_lines(block: Block) -> str:
    """What a shell block asks to be run."""
    if block.kind == "bash":
        return block.code
    return "\n".join(line[2:] for line in block.code.splitlines() if line.startswith("$ "))


def run_shell(code: str, folder: Path, where: str) -> None:
    """Run shell commands in a folder, with this interpreter's own programs first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "docs" / "assets", tmp_path / "docs" / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.reason is not None:
            assert block.reason.strip(), f"{where}: no-run needs a reason"
        elif block.kind == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        elif block.kind in ("bash", "console"):
            run_shell(shell_lines(block), tmp_path, where)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_the_tree_of_the_readme_is_the_tree() -> None:
    """Every module is named in the README's tree, and nothing there is missing from the package."""
    tree = next(b.code for b in blocks((ROOT / "README.md").read_text(encoding="utf-8")) if b.kind == "text")
    source = ROOT / "src" / "sightline"
    ours = [p.relative_to(source) for p in source.rglob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    way: list[str] = []
    told = set()
    for line in tree.splitlines():
        if found := re.match(r"((?:  )+)([\w.]+)", line):
            way[len(found[1]) // 2 - 1 :] = [found[2]]
            if found[2].endswith(".py"):
                told.add(Path(*way))
    assert sorted(set(ours) - told) == [], "the README's tree misses these"
    assert sorted(told - set(ours)) == [], "the README's tree names these, and they are not there"


def test_blocks_are_found_with_their_reason() -> None:
    shell = "<!-- no-run: needs a network -->\n```bash\ncurl\n```\n```console\n$ ls\nout\n```\n"
    page = f"a\n```python\nx = 1\n```\n{shell}"
    found = list(blocks(page))
    assert [(b.kind, b.line, b.reason) for b in found] == [
        ("python", 3, None),
        ("bash", 7, " needs a network "),
        ("console", 10, None),
    ]
    assert shell_lines(found[2]) == "ls"


def test_a_failing_command_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="page:1: exit code 3"):
        run_shell("exit 3", tmp_path, "page:1")
