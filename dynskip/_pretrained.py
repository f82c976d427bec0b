"""Wrapped models as folders and as repositories of the Hugging Face Hub: the methods of both wrappers."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import Self

from dynskip._card import model_card
from dynskip._config import CONFIG, WEIGHTS, compare, describe, from_extra, pack
from dynskip._rebuild import rebuild
from dynskip.errors import DynskipError

CARD = "README.md"


class Pretrained(nn.Module):
    """A model that can be saved and rebuilt: the wrappers derive from it directly.

    A configuration names its wrapper, which is looked up among these direct subclasses. A class of your own that
    derives from a wrapper is saved as that wrapper.

    Attributes:
        task: what a wrapper's models classify, as the Hub names it.
    """

    task: ClassVar[Literal["image-classification", "video-classification"]]

    def save_pretrained(
        self: Any, folder: str | Path, *, results: Sequence[Mapping[str, object]] = (), name: str | None = None
    ) -> Path:
        """Write the model as a folder: configuration, weights and a model card.

        The folder appears once it is complete, and once a model rebuilt from it has given the same answers as this one.
        The backbone has to be made from a timm name; `class_names` and `preprocessing` are saved, too.

        Args:
            folder: new or empty folder to write to.
            results: measured rows for the card's table of results, each a mapping from column to value.
            name: what the card tells readers to load; by default the folder's name.

        Returns:
            The folder.

        Raises:
            DynskipError: if a part cannot be written down, the model is not what its parts' arguments build, or the
                folder is not empty; the message names the part.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DynskipError(f"{folder} is no empty folder. Name a new one, so that nothing is mixed or overwritten.")
        wrappers: Any = Pretrained.__subclasses__()
        wrapper = next(cls for cls in wrappers if isinstance(self, cls))
        weights = pack(self)
        text = json.dumps(describe(self, wrapper, weights), indent=1, allow_nan=False) + "\n"
        # Later classes win: where a part and a layer of the backbone have the same name, the part's class is meant.
        classes = [type(module) for module in self.modules()]
        compare(self, rebuild(json.loads(text), weights, classes, wrappers))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            part = Path(temporary) / "model"
            part.mkdir()
            (part / WEIGHTS).write_bytes(weights)
            (part / CONFIG).write_text(text, encoding="utf-8")
            card = model_card(self, wrapper.__name__, results, name or folder.name)
            (part / CARD).write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            part.replace(folder)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        classes: Iterable[type[nn.Module]] = (),
        revision: str | None = None,
        api: Any = None,
    ) -> Self:
        """Load a model that `save_pretrained` or `push_to_hub` wrote.

        Nothing is unpickled, and no code comes from the folder: parts that are not dynskip's own are built from the
        classes passed here. The weights have to be the file that the configuration was written with, every entry of the
        shape and dtype that the model asks for.

        Args:
            source: a folder, or the name of a repository on the Hugging Face Hub (`"user/model"`).
            classes: your own classes of gates, inner classifiers or terminators that the model has.
            revision: for a repository, branch, tag or commit; a commit's hash pins the content.
            api: a `huggingface_hub.HfApi` to download with; by default a new one.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            DynskipError: if a file is missing, damaged, changed or of a newer format, the model is of another class
                than the one it is loaded with, a class is not known, or the repository cannot be reached.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source), revision, api)
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise DynskipError(f"{folder} has no {file}, so `save_pretrained` did not write it. Copy it whole.")
        try:
            text = (folder / CONFIG).read_text(encoding="utf-8")
            config = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise DynskipError(f"{folder / CONFIG} is damaged ({error}). Save or download it again.") from error
        wrappers: Any = Pretrained.__subclasses__()
        model: Any = rebuild(config, (folder / WEIGHTS).read_bytes(), classes, wrappers)
        if not isinstance(model, cls):
            other = type(model).__name__
            raise DynskipError(f"{source} holds a model of class {other}. Load it with {other}.from_pretrained.")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        results: Sequence[Mapping[str, object]] = (),
        private: bool | None = None,
        commit_message: str = "Upload model",
        api: Any = None,
    ) -> str:
        """Save the model as a repository on the Hugging Face Hub, which is made if it does not exist.

        The card is written anew each time; earlier ones stay in the repository's history.

        Args:
            repo_id: name of the repository, `"user/model"`.
            results: as in `save_pretrained`.
            private: whether a new repository is private; by default as the account says.
            commit_message: first line of the commit.
            api: a `huggingface_hub.HfApi` to upload with (its token, its endpoint); by default a new one, with the
                token that `hf auth login` stored.

        Returns:
            URL of the commit.

        Raises:
            DynskipError: as `save_pretrained`; nothing is uploaded then.
        """
        api = api or from_extra("huggingface_hub").HfApi()
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model", results=results, name=repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(commit.commit_url)


def _finite(number: str) -> float:
    return float(number) if math.isfinite(float(number)) else _refuse(number)


def _refuse(number: str) -> float:
    raise ValueError(f"it has the number {number}")


def _download(source: str, revision: str | None, api: Any) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise DynskipError(f"There is no folder {source!r}. Give one, or a repository's name such as 'user/model'.")
    api = api or from_extra("huggingface_hub").HfApi()
    try:
        return Path(api.snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:
        raise DynskipError(
            f"There is no folder {source!r}, and it could not be downloaded from the Hub ({type(error).__name__}: "
            f"{error}). Check the name, the network and your access, or download the folder by hand and give its path."
        ) from error
