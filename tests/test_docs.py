"""The documentation is code: its Python blocks run, its commands parse, its links lead somewhere.

On a page, every block fenced as ```python runs, in order, in one namespace and an empty folder.
A block with a title, ```python title="my_task.py", is written to that file instead, so that later
blocks can import it. ```py is shown and not run. A page that says `<!-- docs: slow -->` runs only
with `-m slow`.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import re
import shlex
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]
PAGES += sorted((ROOT / "kernels").rglob("*.md")) + sorted((ROOT / "benchmarks").rglob("*.md"))
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S
)
LINK = re.compile(
    r"(?<!!)\[[^\]]*\]\((?!https?:|mailto:|#)([^)#\s]+)|!\[[^\]]*\]\((?!https?:)([^)\s]+)"
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, optional file title, source text and first line number."""

    language: str
    title: str | None
    source: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        info = match["info"].strip()
        title = re.search(r'title="([^"]+)"', info)
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.M)
        line = text[: match.start("body")].count("\n")
        found.append(Block(info.split(" ")[0], title and title[1], body, line))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_pages() -> list[object]:
    pages = [page for page in PAGES if any(b.language == "python" for b in blocks(page))]
    slow = {page for page in pages if "<!-- docs: slow -->" in page.read_text(encoding="utf-8")}
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page in slow else [])
        for page in pages
    ]


@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    titles = []
    for block in blocks(page):
        if block.language != "python":
            continue
        if block.title:
            Path(block.title).write_text(block.source, encoding="utf-8")
            titles.append(Path(block.title).stem)
            continue
        # Blank lines in front make a traceback point at the line of the page.
        exec(compile("\n" * block.line + block.source, str(page), "exec"), namespace)
    for title in titles:
        sys.modules.pop(title, None)


def commands(page: Path) -> list[list[str]]:
    """Words of every shell line, comments, prompts and leading assignments left out."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language in {"bash", "sh", "console"}:
            lines += block.source.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    assignment = re.compile(r"[A-Z_]+=")
    parts = [list(itertools.dropwhile(assignment.match, line)) for line in words]
    return [part for part in parts if part]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    for command in commands(page):
        words = [word for word in command if "=" not in word or word.startswith("-")]
        if words[0] == "make":
            assert set(words[1:]) <= verbs, f"{name_of(page)}: {' '.join(command)}"
        elif words[0] == "prw-flux":
            parse_cli(command[1:], page)


def parse_cli(arguments: list[str], page: Path) -> None:
    from prw_flux.cli import build_parser

    try:
        build_parser().parse_args(arguments)
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{name_of(page)}: prw-flux {shlex.join(arguments)} is refused")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for groups in LINK.findall(text):
        target = next(part for part in groups if part)
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_the_table_of_configuration_fields_is_complete() -> None:
    """Every field of `prw.Config`, in order, with its default and all its choices."""
    import prw

    text = (ROOT / "docs/pages/config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.*)$", text, flags=re.M)
    known = dataclasses.fields(prw.Config)
    assert [name for name, _, _ in rows] == [field.name for field in known]
    hints = get_type_hints(prw.Config)
    for field, (name, shown, described) in zip(known, rows, strict=True):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        assert shown == repr(default).replace("'", '"'), f"{name}: the default is {default!r}"
        for choice in get_args(hints[name]) if get_origin(hints[name]) is Literal else ():
            assert f'`"{choice}"`' in described, f"{name}: {choice!r} is not described"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["-f", str(ROOT / "docs/mkdocs.yml"), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_site_builds_strictly(site: Path) -> None:
    assert (site / "index.html").is_file()


def test_every_public_name_is_on_an_api_page(site: Path) -> None:
    """What any `__all__` lists is in the inventory of the built site, under either of its names."""
    packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")[2]
    listed = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    assert "prw.weave" in listed
    missing = []
    for package in map(importlib.import_module, ("prw", "prw_flux", "prw_kernels")):
        below = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names = [m.name for m in below if not m.name.endswith(("__main__", ".kernels"))]
        for module in map(importlib.import_module, [package.__name__, *names]):
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                home = getattr(value, "__module__", module.__name__)
                titles = {f"{module.__name__}.{name}", f"{home}.{name}"}
                if not titles & listed:
                    missing.append(f"{module.__name__}.{name}")
    assert not missing


def test_the_first_page_leads_to_every_other() -> None:
    folder = ROOT / "docs/pages"
    text = (folder / "index.md").read_text(encoding="utf-8")
    linked = {folder / target for groups in LINK.findall(text) for target in groups if target}
    missing = set(folder.rglob("*.md")) - linked - {folder / "index.md"}
    assert not missing, f"index.md does not link to {sorted(map(str, missing))}"
