"""What both wrappers have of the hub: methods that save a model, load it and share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import Self

from dynskip.errors import DynskipError


class Pretrained:
    """A model that `dynskip.hub` can write down and rebuild."""

    def save_pretrained(self: Any, folder: str | Path, **options: Any) -> Path:
        """Write the model as a folder that rebuilds it elsewhere; see `dynskip.hub.save_pretrained`.

        Args:
            folder: new or empty folder to write to.
            **options: `results`, `name`.

        Returns:
            The folder.
        """
        from dynskip.hub import save_pretrained

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
        from dynskip.hub import from_pretrained

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
        from dynskip.hub import push_to_hub

        return push_to_hub(self, repo_id, **options)
