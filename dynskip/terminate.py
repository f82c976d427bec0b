"""Early termination: stop reading a video once its prediction is confident."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dynskip._check import Checked
from dynskip.activation import Activation, check_activation, confidence
from dynskip.errors import DynskipError


class EarlyTerminator(Checked):
    """End a video when its prediction is more certain than a threshold, after more than `min_frames` frames.

    With a softmax, the probability of the top class has to exceed the threshold. With a sigmoid, every class has to be
    decided: its probability exceeds the threshold, or lies below 1 minus it.

    A rule of your own is a subclass with other `scores`, whose parameters `dynskip.calibrate` then chooses.

    Args:
        threshold: probability that the prediction has to exceed, in (0, 1].
        min_frames: frames that are always looked at; the next one is the first that can end the video.

    Attributes:
        activation: the model's head activation, which the model sets.

    Raises:
        DynskipError: if the threshold or the number of frames is out of range.

    Reference:
        Thesis Eq. 3.7 (`rho`, `T_min`).

    Examples:
        >>> terminator = EarlyTerminator(0.9, min_frames=2)
        >>> terminator(torch.tensor([[0.95, 0.05], [0.6, 0.4]]), torch.tensor([3, 3]))  # the first video ends
        tensor([ True, False])
    """

    activation: Activation = "softmax"

    def __init__(self, threshold: float = 0.999, min_frames: int = 3) -> None:
        super().__init__()
        self.threshold = threshold
        self.min_frames = min_frames

    def check_setting(self, name: str, value: Any) -> Any:
        """Refuse a threshold that is no probability, and what is no number of frames."""
        if name == "threshold" and not (isinstance(value, int | float) and 0.0 < value <= 1.0):
            raise DynskipError(f"Termination threshold {value} is no probability; give one in (0, 1], such as 0.999.")
        if name == "min_frames" and not (isinstance(value, int) and 0 <= value < 2**63):
            raise DynskipError(
                f"min_frames={value} is no whole number from 0 to 2**63 - 1; give a number of frames, such as 3."
            )
        if name == "activation":
            check_activation(value)
        return super().check_setting(name, value)

    def scores(self, probabilities: Tensor, frames_seen: Tensor) -> dict[str, Tensor]:
        """Return what the rule's parameters are compared with. A video ends where every score exceeds its parameter.

        So the larger a parameter, the later videos end. Calibration chooses these parameters, among values between the
        scores that it observes.

        Args:
            probabilities: as in `forward`.
            frames_seen: as in `forward`.

        Returns:
            `(B,)` scores by the name of the attribute that holds the parameter. NaN where there is no prediction yet.
        """
        return {"threshold": confidence(probabilities, self.activation)}

    def forward(self, probabilities: Tensor, frames_seen: Tensor) -> Tensor:
        """Say which videos are finished.

        Args:
            probabilities: `(B, K)` running prediction of each video; NaN where no frame has been used yet.
            frames_seen: `(B,)` frames looked at so far, stopped ones included.

        Returns:
            `(B,)` boolean, true where the video ends here.
        """
        # A NaN compares as false: a video without a prediction goes on.
        ended = frames_seen > self.min_frames
        for name, score in self.scores(probabilities, frames_seen).items():
            ended = ended & (score > getattr(self, name))
        return ended

    def extra_repr(self) -> str:
        """Show the rule."""
        what = "probability" if self.activation == "softmax" else "probability of what is decided of each class"
        return f"{what} > {self.threshold}, after more than {self.min_frames} frames"
