"""The names this project may and may not put on a user's import path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGES = {"prw", "prw_flux", "prw_kernels"}
FOLDERS = {"prw": "prw", "prw_flux": "prw_flux", "prw_kernels": "kernels/prw_kernels"}


def test_kernels_is_a_folder_and_not_a_package(repository: Path) -> None:
    found = list((repository / "kernels").glob("*.py"))
    assert not found, "kernels/ must stay a plain folder: the import name is Hugging Face's"


def test_no_installed_distribution_of_ours_claims_the_name_kernels() -> None:
    assert "prw" not in packages_distributions().get("kernels", [])


def test_installed_process_in_the_checkout_finds_no_kernels_inside_it(repository: Path) -> None:
    code = (
        "import importlib.util as u; s = u.find_spec('kernels');"
        "print([] if s is None else list(s.submodule_search_locations or []))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code]
    output = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert str(repository) not in output


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_is_typed_and_has_a_docstring(repository: Path, package: str) -> None:
    folder = repository / FOLDERS[package]
    assert (folder / "py.typed").is_file()
    assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_test_folders_do_not_carry_an_importable_name(repository: Path) -> None:
    names = {path.name for path in (repository / "tests").iterdir() if path.is_dir()}
    assert names.isdisjoint(PACKAGES | {"kernels", "benchmarks", "diffusers", "torch"})
    assert not list((repository / "tests").rglob("__init__.py"))


def test_version_is_the_newest_one_of_the_changelog(repository: Path) -> None:
    import prw

    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", changelog, flags=re.MULTILINE)
    assert versions and versions[0] == prw.__version__


def test_constraints_pin_every_direct_dependency_once(repository: Path) -> None:
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=; ]", line, maxsplit=1)[0].lower() for line in wanted} - {"prw"}
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("#")[0].strip().lower() for line in lines]
    pinned = [pin.split("==")[0] for pin in pins if pin]
    assert len(pinned) == len(set(pinned))
    assert all("==" in pin and "+" not in pin for pin in pins if pin)
    assert names <= set(pinned), f"not in constraints.txt: {sorted(names - set(pinned))}"


def test_what_safetensors_writes_through_is_a_dependency(repository: Path) -> None:
    """Neither torch nor plain safetensors brings numpy, and without it `weave.save` fails."""
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(line.startswith("safetensors[torch]") for line in project["dependencies"])


def test_no_import_of_a_heavy_extra_through_the_library() -> None:
    heavy = ["accelerate", "datasets", "diffusers", "hypothesis", "matplotlib", "peft", "rich"]
    heavy += ["transformers", "triton"]
    code = (
        "import sys; before = set(sys.modules); import prw;"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


@pytest.mark.slow
def test_wheel_holds_exactly_the_three_packages(repository: Path, tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            str(repository),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == PACKAGES
    assert PACKAGES <= {name.split("/")[0] for name in names if name.endswith("/py.typed")}
    shipped = [p for p in (repository / "prw_flux/tiny/weights").rglob("*") if p.is_file()]
    shipped += (repository / "prw_flux/evaluation/published").glob("*.csv")
    missing = {p.relative_to(repository).as_posix() for p in shipped} - set(names)
    assert not missing, f"not in the wheel: {sorted(missing)}"
