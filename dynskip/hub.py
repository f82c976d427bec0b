"""Save a wrapped model as a folder that rebuilds it elsewhere, and share it on the Hugging Face Hub.

The folder has `config.json` (everything but the weights, in plain values), `model.safetensors` and a model card. No
code comes with a model: parts are of dynskip's own classes, or of classes that the user passes when loading.

The functions are the wrappers' methods of the same names, with the model as the first argument. `from_pretrained` loads
a model of either wrapper.
"""

from dynskip._pretrained import Pretrained

save_pretrained = Pretrained.save_pretrained
from_pretrained = Pretrained.from_pretrained
push_to_hub = Pretrained.push_to_hub

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
