"""Save a wrapped model as a folder that rebuilds it elsewhere, and share it on the Hugging Face Hub.

The folder has `config.json` (everything but the weights, in plain values), `model.safetensors` and a model card. No
code comes with a model: parts are of dynskip's own classes, or of classes that the one who loads it passes.
"""

from dynskip._pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
