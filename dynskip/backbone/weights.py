"""Weight files for backbones."""

from __future__ import annotations

import zipfile
from pathlib import Path

import timm
from torch import Tensor, nn

from dynskip.errors import DynskipError, lacks_memory


def load_weights(model: nn.Module, file: str | Path) -> bool:
    """Load a timm checkpoint into a model. No code in the file is run.

    A model without a classifier leaves the file's out.

    Args:
        model: a timm model, such as `backbone.model`.
        file: `.safetensors`, or a PyTorch file that holds tensors only.

    Returns:
        Whether the classifier was loaded, too; it is left as it is if the file has another number of classes.

    Raises:
        DynskipError: if the file cannot be read, or holds weights of another model.
    """
    # Counters of training steps come in several shapes, and nothing that is run depends on them.
    state = {k: v for k, v in _read(Path(file)).items() if not k.endswith("num_batches_tracked")}
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    head = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    head = (head if isinstance(head, str) else head[0]) + "."
    if not any(k.startswith(head) for k in own):
        state = {k: v for k, v in state.items() if not k.startswith(head)}
    skipped = [k for k in own if k.startswith(head) and k in state and state[k].shape != own[k].shape]
    missing = [k for k in own if k not in state]
    foreign = [k for k in state if k not in own]
    wrong = [k for k in own if k in state and state[k].shape != own[k].shape and k not in skipped]
    if missing or foreign or wrong:
        examples = ", ".join((missing + foreign + wrong)[:3])
        raise DynskipError(
            f"{file} holds weights of another model: {len(missing)} entries are missing, {len(foreign)} unknown, "
            f"{len(wrong)} of another shape, such as {examples}. Name the model that they were made for."
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in skipped}, strict=False)
    return not skipped


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise DynskipError(f"{file} does not exist. Give a file of weights.")
    try:
        if file.suffix != ".safetensors":  # `torch.load` does not compare checksums
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
        found = timm.models.load_state_dict(str(file), weights_only=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
    except Exception as error:  # a damaged file can fail in any way
        if lacks_memory(error):
            raise
        raise DynskipError(
            f"{file} cannot be read as weights ({type(error).__name__}). Expected .safetensors, or a PyTorch file that "
            "holds tensors only; it may be damaged or cut off, so copy it again."
        ) from error
