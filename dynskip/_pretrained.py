"""Wrapped models as folders and as repositories of the Hugging Face Hub, and what both wrappers have of it.

The public functions are documented as `dynskip.hub`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn
from typing_extensions import Self

from dynskip._card import model_card
from dynskip._config import CONFIG, WEIGHTS, compare, describe, fingerprint, pack, part_classes, rebuild
from dynskip.errors import DynskipError

if TYPE_CHECKING:
    from dynskip._config import Wrapped

CARD = "README.md"


class Pretrained:
    """A model that `dynskip.hub` can write down and rebuild: the wrappers derive from it directly.

    A configuration names its wrapper, which is looked up among these direct subclasses. A class of your own that
    derives from a wrapper is saved as that wrapper.

    Attributes:
        task: what a wrapper's models classify, as the Hub names it. Video wrappers have a terminator, `state_update`
            and a cost table of their own, which are saved, too; image wrappers have `exits` in their place.
    """

    task: ClassVar[Literal["image-classification", "video-classification"]]

    def save_pretrained(self: Any, folder: str | Path, **options: Any) -> Path:
        """Write the model as a folder that rebuilds it elsewhere; see `dynskip.hub.save_pretrained`.

        Args:
            folder: new or empty folder to write to.
            **options: `results`, `name`.

        Returns:
            The folder.
        """
        return save_pretrained(self, folder, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load what `save_pretrained` or `push_to_hub` wrote; see `dynskip.hub.from_pretrained`.

        Args:
            source: a folder, or the name of a repository on the Hugging Face Hub.
            **options: `classes`, `revision`, `api`.

        Returns:
            The model, in eval mode.

        Raises:
            DynskipError: if the folder holds a model of another class, or it cannot be loaded.
        """
        model = from_pretrained(source, **options)
        if not isinstance(model, cls):
            other = type(model).__name__
            raise DynskipError(f"{source} holds a model of class {other}. Load it with {other}.from_pretrained.")
        return model

    def push_to_hub(self: Any, repo_id: str, **options: Any) -> str:
        """Save the model as a repository on the Hugging Face Hub; see `dynskip.hub.push_to_hub`.

        Args:
            repo_id: name of the repository, `"user/model"`.
            **options: `results`, `private`, `commit_message`, `api`.

        Returns:
            URL of the commit.
        """
        return push_to_hub(self, repo_id, **options)


def save_pretrained(
    model: Wrapped, folder: str | Path, *, results: Sequence[Mapping[str, object]] = (), name: str | None = None
) -> Path:
    """Write a model as a folder: configuration, weights and a model card.

    The folder appears once it is complete, and once a model rebuilt from it has answered as this one does.

    Args:
        model: a model around a backbone that was made from a timm name; its `class_names` and `preprocessing` are
            saved, too.
        folder: new or empty folder to write to.
        results: measured rows for the card's table of results, each a mapping from column to value.
        name: what the card tells readers to load; by default the folder's name.

    Returns:
        The folder.

    Raises:
        DynskipError: if a part cannot be written down, the model is not what its parts' arguments build, or the folder
            is not empty; the message names the part.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DynskipError(f"{folder} is no empty folder. Name a new one, so that nothing is mixed or overwritten.")
    wrapper = next(cls.__name__ for cls in _wrappers() if isinstance(model, cls))
    config = describe(model, wrapper)
    weights = pack(model)
    config["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    config["config_sha256"] = fingerprint(config)
    try:
        text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise DynskipError(
            "An argument of the model is NaN or infinite, which JSON cannot hold. Give it a finite number."
        ) from error
    compare(model, rebuild(json.loads(text), weights, part_classes(model), _wrappers()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        (part / WEIGHTS).write_bytes(weights)
        (part / CONFIG).write_text(text, encoding="utf-8")
        (part / CARD).write_text(model_card(model, wrapper, results, name or folder.name), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def from_pretrained(
    source: str | Path,
    *,
    classes: Iterable[type[nn.Module]] = (),
    revision: str | None = None,
    api: Any = None,
) -> Wrapped:
    """Load a model that `save_pretrained` or `push_to_hub` wrote.

    Nothing is unpickled, and no code comes from the folder: parts that are not dynskip's own are built from the classes
    passed here. The weights have to be the file that the configuration was written with, every entry of the shape and
    dtype that the model asks for.

    Args:
        source: a folder, or the name of a repository on the Hugging Face Hub (`"user/model"`).
        classes: your own classes of gates, inner classifiers or terminators that the model has.
        revision: for a repository, branch, tag or commit; a commit's hash pins the content.
        api: a `huggingface_hub.HfApi` to download with; by default a new one.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        DynskipError: if a file is missing, damaged, changed or of a newer format, a class is not known, or the
            repository cannot be reached.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source), revision, api)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise DynskipError(
                f"{folder} has no {file}, so it is no folder that `save_pretrained` wrote. Copy it whole."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DynskipError(f"{folder / CONFIG} is damaged ({error}). Save or download it again.") from error
    return rebuild(config, (folder / WEIGHTS).read_bytes(), classes, _wrappers())


def push_to_hub(
    model: Wrapped,
    repo_id: str,
    *,
    results: Sequence[Mapping[str, object]] = (),
    private: bool | None = None,
    commit_message: str = "Upload model",
    api: Any = None,
) -> str:
    """Save a model as a repository on the Hugging Face Hub, which is made if it does not exist.

    The card is written anew each time; earlier ones stay in the repository's history.

    Args:
        model: as in `save_pretrained`.
        repo_id: name of the repository, `"user/model"`.
        results: as in `save_pretrained`.
        private: whether a new repository is private; by default as the account says.
        commit_message: first line of the commit.
        api: a `huggingface_hub.HfApi` to upload with (its token, its endpoint); by default a new one, with the token
            that `hf auth login` stored.

    Returns:
        URL of the commit.

    Raises:
        DynskipError: as `save_pretrained`; nothing is uploaded then.
    """
    api = api or _hub_api()
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model", results=results, name=repo_id)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.commit_url)


def _wrappers() -> list[type[Any]]:
    return Pretrained.__subclasses__()


def _hub_api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DynskipError("The Hub is reached with huggingface_hub. Run `pip install 'dynskip[hub]'`.") from error
    return HfApi()


def _download(source: str, revision: str | None, api: Any) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise DynskipError(f"There is no folder {source!r}. Give one, or a repository's name such as 'user/model'.")
    api = api or _hub_api()
    try:
        return Path(api.snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:
        raise DynskipError(
            f"There is no folder {source!r}, and it cannot be had from the Hub ({type(error).__name__}: {error}). "
            "Check the name, the network and your access, or download the folder elsewhere and give its path."
        ) from error
