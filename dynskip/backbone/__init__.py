"""Any model as stages that run one at a time, on any subset of a batch."""

from dynskip.backbone.carry import Carry
from dynskip.backbone.cut import stage_model
from dynskip.backbone.staged import StagedBackbone

__all__ = ["Carry", "StagedBackbone", "stage_model"]
