"""What `from package import *` promises is there, documented, and the same on every page."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types

import pytest

PACKAGES = ["prw", "prw_flux", "prw_kernels"]


def modules_of(package: str) -> list[str]:
    """Dotted names of a package and everything below it, `__main__` files left out."""
    root = importlib.import_module(package)
    below = pkgutil.walk_packages(root.__path__, prefix=f"{package}.")
    return [package, *(m.name for m in below if not m.name.endswith("__main__"))]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports(package: str) -> None:
    for name in modules_of(package):
        importlib.import_module(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_importable_and_complete(package: str) -> None:
    module = importlib.import_module(package)
    exported = [name for name in module.__all__ if name != "__version__"]
    assert len(exported) == len(set(exported))
    public = {
        name
        for name in dir(module)
        if not name.startswith("_") and not isinstance(getattr(module, name), types.ModuleType)
    }
    public -= {"annotations", "TYPE_CHECKING", "Any"}
    undeclared = {name for name in public - set(exported) if not_from_elsewhere(module, name)}
    assert not undeclared, f"{package} shows {sorted(undeclared)} without declaring them in __all__"
    for name in exported:
        getattr(module, name)


def not_from_elsewhere(module: types.ModuleType, name: str) -> bool:
    """True for a name that one of our packages defines."""
    home = getattr(getattr(module, name), "__module__", module.__name__) or ""
    return home.split(".")[0] in PACKAGES


def methods_of(cls: type) -> list[str]:
    """Public methods and properties that the class itself writes."""
    kinds = (types.FunctionType, property, classmethod, staticmethod)
    return [
        name for name, value in vars(cls).items() if name[0] != "_" and isinstance(value, kinds)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: str) -> None:
    bare = []
    for module in map(importlib.import_module, modules_of(package)):
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isroutine(value):
                bare += [] if inspect.getdoc(value) else [f"{module.__name__}.{name}"]
            if inspect.isclass(value):
                methods = [m for m in methods_of(value) if not inspect.getdoc(getattr(value, m))]
                bare += [f"{module.__name__}.{name}.{m}" for m in methods]
    assert not bare, f"without a docstring: {bare}"


def test_contract_of_the_library() -> None:
    import prw

    functions = ("weave", "load", "from_pretrained", "veteran_gate_loss")
    assert all(callable(getattr(prw, name)) for name in functions)
    methods = """unlock close parameters sync record call at_stage rollback force_route remember
    consolidate save unload rename freeze thaw export_expert import_expert merge merge_average
    push_to_hub"""
    assert all(callable(getattr(prw.Weave, name)) for name in methods.split())
    fields = "target_modules rank alpha granularity share_router router_train gate noise backend"
    config = prw.Config(target_modules=["to_k"], rank=4, alpha=8)
    assert all(hasattr(config, name) for name in fields.split())


def test_contract_of_the_flux_package() -> None:
    import prw_flux

    assert {"CoLoGenPipeline", "PRWAdapter", "recipes"} <= set(prw_flux.__all__)
    methods = "from_pretrained save_pretrained encode_source __call__"
    assert all(callable(getattr(prw_flux.CoLoGenPipeline, name)) for name in methods.split())
