"""Wrap a timm classifier, calibrate its gates without labels or training, and run it on a video as frames arrive.

    python examples/wrap_your_backbone.py

The frames are rendered and the weights are random, so that nothing is downloaded. The lines between the two marks are
all there is to it; with a model and frames of your own, they stay as they are.
"""

from __future__ import annotations

import numpy as np
import torch

from dynskip import FixedGate, SimilarityGate, StopOrForward, calibrate, stage_model
from dynskip.video import stick_figures


def render(count: int, length: int, size: int = 64) -> torch.Tensor:
    """Render stick figures at some action as normalised videos `(count, length, 3, size, size)`."""
    drawn = [
        stick_figures.draw_video(stick_figures.CLASSES[i % 6], np.random.default_rng(i), size, 3 * length)[0]
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(drawn)[:, ::3]).permute(0, 1, 4, 2, 3) / 127.5 - 1


torch.manual_seed(0)
clips, video = render(6, 16), render(1, 32)[0]

# -- from here
backbone = stage_model("test_resnet", num_classes=10, input_size=(3, 64, 64))  # pretrained=True for yours
first, *others = backbone.num_features
gates = [SimilarityGate(first), *(FixedGate() for _ in others)]  # stop a frame that is much like the last used one
model = StopOrForward(backbone, gates).eval()

answers = model(clips, dense=True).logits.argmax(-1)  # of the dense network; or labels, if you have them
calibrate.to_accuracy(model, [(clips, answers)], max_loss=0.05).apply(model)

session = model.stream()
for frame in video:
    step = session(frame)  # what became of it: step.stopped_at, step.running_probabilities, step.frame_macs
result = session.result()
print(f"class {result.logits.argmax()}, {result.frames_used[0]} frames used, {result.macs[0] / 1e9:.3f} GMACs")
# -- to here
