"""Sharing a woven folder through the Hugging Face Hub: safetensors and JSON, nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prw import checkpoint, lora_format
from prw.card import model_card
from prw.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from prw.weaving import Weave

CARD = "README.md"
FILES = (
    checkpoint.INDEX,
    checkpoint.ROUTER,
    f"experts/*/{lora_format.WEIGHTS}",
    f"experts/*/{lora_format.SETTINGS}",
)
"""What is asked of a repository; anything else in it is never downloaded."""


def push_to_hub(
    weave: Weave,
    repo_id: str,
    *,
    license: str,
    base_model: str | None = None,
    example: str | None = None,
    memories: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Weave",
    token: str | None = None,
) -> str:
    """Upload the folder of a weave with a model card; the repository is made where it is missing.

    Experts that the repository has and the weave has not are removed in the same commit.

    Args:
        weave: at least one stage.
        repo_id: ``"name"`` or ``"owner/name"``.
        license, base_model, example: for the card, see `prw.card.model_card`.
        memories: upload the router inputs kept by `Weave.remember`, too. For a first layer these
            are training data, so they stay behind unless asked for.
        private: of a repository that is made now; None leaves it to the Hub.
        revision: an existing branch; None is the main one.
        message: of the commit.
        token: None uses the one of ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: huggingface_hub is not installed, or the licence or the name cannot be.
        CheckpointError: the folder cannot be written, the Hub refuses, or there is no network.
    """
    card = model_card(
        weave, repo_id, license=license, base_model=base_model, example=example,
        memories=memories and _remembers(weave),
    )  # fmt: skip
    hub = _library()
    with tempfile.TemporaryDirectory(prefix="prw-") as place, explained(repo_id, revision):
        folder = Path(place) / "weave"
        checkpoint.save(
            folder, weave.pools, weave.ledger, weave.config, weave.fingerprint,
            extra={CARD: card}, memories=memories,
        )  # fmt: skip
        hub.create_repo(repo_id, private=private, exist_ok=True, token=token)
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision,
            allow_patterns=[*FILES, CARD], delete_patterns=["experts/*"], token=token,
        )  # fmt: skip
    return str(commit.commit_url)


def from_pretrained(
    model: nn.Module,
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Weave:
    """Weave `model` as a folder or a Hub repository says and load it, as `prw.load` does.

    Args:
        model: the base, untouched if anything fails.
        repo_or_folder: a folder, if there is one of that name, otherwise ``"owner/name"``.
        revision: branch, tag or commit of a repository; name a commit for the same bits for ever.
        token: None uses the one of ``hf auth login``.
        cache_dir: where downloads are kept; None is the Hub's own cache.

    Raises:
        ConfigError: huggingface_hub is not installed, or a revision is given for a folder.
        CheckpointError: there is no such repository, revision or network, it holds no weave, or
            `prw.load` refuses it.
    """
    from prw.injection import load  # it imports Weave, which imports this module's functions

    if Path(repo_or_folder).is_dir():
        if revision is not None:
            raise ConfigError(f"{repo_or_folder} is a folder, which has no revision {revision!r}")
        return load(model, repo_or_folder)
    repo_id = str(repo_or_folder)
    if isinstance(repo_or_folder, Path) or repo_id.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {repo_or_folder}")
    return load(model, _download(repo_id, revision, token, cache_dir))


def _download(
    repo_id: str, revision: str | None, token: str | None, cache_dir: str | Path | None
) -> Path:
    from prw import __version__

    hub = _library()
    with explained(repo_id, revision):
        folder = Path(
            hub.snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, token=token,
                allow_patterns=list(FILES), library_name="prw", library_version=__version__,
            )
        )  # fmt: skip
    if not (folder / checkpoint.INDEX).is_file():
        raise CheckpointError(f"{repo_id!r} holds no {checkpoint.INDEX}; it is not a weave")
    return folder


def _remembers(weave: Weave) -> bool:
    pools = weave.pools.values()
    return any(len(pool.columns.memory(s.index)) for pool in pools for s in weave.stages)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(
            'the Hub needs the package huggingface_hub: pip install "prw[hub]"'
        ) from None
    return huggingface_hub


@contextmanager
def explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence what went wrong between here and the Hub."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is no folder here and cannot name a repository ('owner/name'): "
            f"{_line(error)}"
        ) from None
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id!r} is gated: ask for access at https://huggingface.co/{repo_id}, then log "
            "in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder here nor a repository on the Hub that you may use; "
            "check the name, or log in with `hf auth login` if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo_id!r} has no revision {revision!r}") from None
    except errors.LocalTokenNotFoundError:
        raise CheckpointError(f"{repo_id!r} needs a login: run `hf auth login`") from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refused {repo_id!r}: {_line(error)}") from error
    except (ConnectionError, errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise CheckpointError(
            f"the Hub cannot be reached for {repo_id!r}: check the network and HF_HUB_OFFLINE"
        ) from error


def _line(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
