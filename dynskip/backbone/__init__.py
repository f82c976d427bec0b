"""Any model as stages that run one at a time, on any subset of a batch."""

from dynskip.backbone.carry import Carry
from dynskip.backbone.cut import stage_model
from dynskip.backbone.staged import StagedBackbone, encode_images, lay_out

__all__ = ["Carry", "StagedBackbone", "encode_images", "lay_out", "stage_model"]
