"""Where a model comes from: a folder, the embedded model, an imported one, or Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dormouse.domain.errors import ModelError, ModelFilesMissing, ModelNotFound
from dormouse.models.embedded import EMBEDDED_NAME, embedded_model
from dormouse.models.folder import ModelFolder, open_folder
from dormouse.models.progress import Progress, no_progress

# Settings, templates and weights; never a pickle, never code.
HUB_PATTERNS = ("*.json", "*.jinja", "*.safetensors")

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def resolve(
    reference: str, models_dir: Path, *, revision: str | None = None, on_progress: Progress = no_progress
) -> ModelFolder:
    """The folder of the model that `reference` means, downloaded or imported when it has to be.

    In this order: an existing folder, the embedded model's name, the name of a model in `models_dir`,
    a Hugging Face id (at `revision`). Raises ModelNotFound when it is none of them, ModelFilesMissing
    when files lack or cannot be fetched, ModelError when what was found is damaged.
    """
    if _is_folder(path := Path(reference)):
        return open_folder(path)
    if reference.lower().endswith(".gguf"):
        raise ModelNotFound(f"{reference} is a GGUF file; run `dormouse models import {reference}` first")
    if reference == EMBEDDED_NAME:
        return embedded_model(models_dir, on_progress)
    if _MODEL_NAME.fullmatch(reference) and _is_folder(models_dir / reference):
        return open_folder(models_dir / reference)
    if _HUB_ID.fullmatch(reference):
        return _from_hub(reference, revision)
    raise ModelNotFound(
        f"no model {reference!r}: it is no folder, not {EMBEDDED_NAME}, not one of {models_dir} "
        f"({', '.join(folder.name for folder in list_models(models_dir)) or 'which is empty'}) and no "
        "Hugging Face id (owner/name)"
    )


def list_models(models_dir: Path) -> list[ModelFolder]:
    """The whole model folders in `models_dir`, by name; what is unfinished or damaged is left out."""
    if not models_dir.is_dir():
        return []
    found = []
    for path in sorted(models_dir.iterdir()):
        if path.is_dir() and check_name(path.name):
            try:
                found.append(open_folder(path))
            except ModelError:
                continue
    return found


def has_model(name: str, models_dir: Path) -> bool:
    """Whether `models_dir` has a folder for a model of that name; it is not looked into."""
    return check_name(name) and _is_folder(models_dir / name)


def import_target(name: str, models_dir: Path) -> Path:
    """The folder for a model to be imported as `name`. Raises ModelError when it cannot be a name."""
    if not check_name(name) or name == EMBEDDED_NAME:
        raise ModelError(
            f"a model cannot be called {name!r}; use letters, digits, dots, dashes and underscores, "
            f"and not {EMBEDDED_NAME}, which is the embedded model"
        )
    return models_dir / name


def check_name(name: str) -> bool:
    """Whether `name` can name a model in the models folder."""
    return _MODEL_NAME.fullmatch(name) is not None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long to be a path
        return False


def _from_hub(repo: str, revision: str | None) -> ModelFolder:
    try:
        path = snapshot_download(repo, revision=revision, allow_patterns=list(HUB_PATTERNS))
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repo} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"Hugging Face has no {repo}{f' at {revision}' if revision else ''} that you may read; check the "
            "spelling, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:
        # What a broken connection raises depends on the HTTP library, which the hub's releases change.
        raise ModelFilesMissing(
            f"cannot fetch {repo} from Hugging Face and it is not in the local cache ({_first_line(error)}); "
            "connect to the network once, or give the path of a model folder"
        ) from error
    return open_folder(Path(path), repo)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
