"""The page "What it lives with" says what the tests of coexistence say, marks included."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/pages/lives-with.md"
ROW = re.compile(r"^\| (.+?) \| (works|refused|GPU) \| (.*?) ?\| `(test_\w+)` \|$", re.M)


@dataclass(frozen=True)
class Test:
    """What the source of a test says of it."""

    __test__ = False

    gpu: bool
    cpu: bool
    raises: bool


def written() -> dict[str, Test]:
    """Every test of coexistence; one of which only some parameters are marked runs on both."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_coexistence_*.py")):
        if path == Path(__file__):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        lists = {
            target.id: ast.unparse(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(decorator) for decorator in node.decorator_list]
                named = " ".join(lists[name] for name in lists if name in " ".join(marks))
                gpu = "pytest.mark.gpu" in marks
                found[node.name] = Test(
                    gpu=gpu or "mark.gpu" in named,
                    cpu=not gpu,
                    raises="pytest.raises" in ast.unparse(node),
                )
    return found


def rows() -> list[tuple[str, str, str]]:
    """Feature, state and test of each row of the page's tables."""
    table = PAGE.read_text("utf-8").split("## Why one expert")[0]
    found = [(m[1], m[2], m[4]) for m in ROW.finditer(table)]
    assert len(found) == sum("`test_" in line for line in table.splitlines() if line[:1] == "|")
    return found


def test_every_row_is_a_test_of_that_kind() -> None:
    tests = written()
    for feature, state, name in rows():
        assert name in tests, f"{feature}: there is no {name}"
        found = tests[name]
        fits = {"works": found.cpu, "refused": found.cpu and found.raises, "GPU": found.gpu}
        assert fits[state], f"{feature} is {state!r}, but {name} is {found}"


def test_every_test_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    apart = {"test_a_stock_transformer_has_the_classes_we_check"}
    missing = [name for name in written() if f"`{name}`" not in text and name not in apart]
    assert not missing
    gpu = {name for name, found in written().items() if found.gpu}
    assert gpu == {name for _, state, name in rows() if state == "GPU"}
