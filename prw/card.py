"""The model card of a woven folder: what is in it, for which base, and how to use it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prw.errors import ConfigError

if TYPE_CHECKING:
    from prw.weaving import Weave

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MEMORIES = """
The routers remember some of their inputs, for consolidation (`router.safetensors`).
"""
_TEMPLATE = """\
---
{front}
---

# {title}

{stages} of routed LoRA experts for a frozen base, grown with PRW (progressive representation
weaving). Every tensor is stored as safetensors, with its sha256 in `prw.json`.

## Use

```python
{example}
```

`prw` needs `pip install "prw[hub]"` to read from the Hub. Only safetensors and JSON files are read,
and their hashes are verified.

## Stages

| stage | state | expert | rank | parameters |
|---|---|---|---:|---:|
{rows}

Each expert opens with PEFT, too: its folder is a plain LoRA. {routing}
Layers that are adapted: {count} ({targets}).
{memories}
## Base

The base is not in this folder.

| field | value |
|---|---|
{base}
"""


def model_card(
    weave: Weave,
    repo_id: str,
    *,
    license: str,
    base_model: str | None = None,
    example: str | None = None,
    memories: bool = False,
) -> str:
    """The text of a ``README.md`` with the front matter that the Hub reads.

    Args:
        weave: with at least one stage.
        repo_id: where the folder will lie, or how to call it.
        license: the Hub's identifier of the licence of the experts, ``"apache-2.0"``.
        base_model: the base's own id on the Hub, if it has one.
        example: Python lines that make the base ``model`` and an input ``x``: with them, the
            card's example runs as it stands.
        memories: whether the folder holds remembered router inputs.

    Raises:
        ConfigError: the licence is no such identifier, or there is no stage.
    """
    if not _LICENCE.fullmatch(license):
        raise ConfigError(
            f"license is an identifier like 'apache-2.0' or 'other', in small letters; "
            f"got {license!r}"
        )
    if not weave.stages:
        raise ConfigError("there is no stage to share; unlock one and train it first")
    return _TEMPLATE.format(
        front=_front(license, base_model),
        title=repo_id,
        stages="One stage" if len(weave.stages) == 1 else f"{len(weave.stages)} stages",
        example=_example(weave, repo_id, example),
        rows="\n".join(_rows(weave)),
        routing=_routing(weave),
        count=sum(len(pool.targets) for pool in weave.pools.values()),
        targets=", ".join(f"`{name}`" for name in weave.config.target_modules),
        memories=_MEMORIES if memories else "",
        base="\n".join(f"| {key} | {value} |" for key, value in _base(weave, base_model).items()),
    )


def digest(fingerprint: Mapping[str, Any]) -> str:
    """A short name of a base: sha256 of its class, configuration and layers, 16 digits."""
    kept = {key: fingerprint.get(key) for key in ("class", "config", "modules")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _front(license: str, base_model: str | None) -> str:
    # JSON strings are YAML strings.
    lines = [f"license: {json.dumps(license)}", "library_name: prw"]
    lines += [f"base_model: {json.dumps(base_model)}"] if base_model else []
    return "\n".join([*lines, "tags: [prw, lora, mixture-of-experts, continual-learning]"])


def _example(weave: Weave, repo_id: str, example: str | None) -> str:
    first = weave.stages[0].name
    made = example or f"# make the base, a {weave.fingerprint['class']}, and its input: model, x"
    lines = [
        made.strip(),
        f"weave = prw.from_pretrained(model.eval(), {json.dumps(repo_id)})",
        "y = model(x)  # every router chooses freely",
        f"with weave.at_stage({json.dumps(first)}):",
        "    y = model(x)  # as the model was at the end of that stage",
    ]
    return "import prw\n\n" + "\n".join(lines)


def _rows(weave: Weave) -> list[str]:
    rows = []
    for stage in weave.stages:
        experts = [(pool, pool.expert(stage.index)) for pool in weave.pools.values()]
        ranks = sorted({expert.rank(p) for pool, expert in experts for p in pool.projections})
        size = sum(p.numel() for _, expert in experts for p in expert.parameters())
        state = "open" if stage.open else "closed"
        folder = f"`experts/{stage.index}-{stage.name}`"
        told = ", ".join(map(str, ranks))
        rows.append(f"| {stage.name} | {state} | {folder} | {told} | {size:,} |")
    return rows


def _routing(weave: Weave) -> str:
    size = sum(p.numel() for pool in weave.pools.values() for p in pool.columns.parameters())
    unit = {"token": "token by token", "sample": "sample by sample"}[weave.config.granularity]
    one = len(weave.pools) == 1
    who, verb = ("One router", "chooses") if one else (f"{len(weave.pools)} routers", "choose")
    return f"{who} ({size:,} parameters) {verb} one expert {unit}."


def _base(weave: Weave, base_model: str | None) -> dict[str, str]:
    found = {"model": f"`{base_model}`"} if base_model else {}
    return found | {
        "class": f"`{weave.fingerprint['class']}`",
        "fingerprint": f"`{digest(weave.fingerprint)}`",
        "layers in the fingerprint": str(len(weave.fingerprint["modules"])),
    }
