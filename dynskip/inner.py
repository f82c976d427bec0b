"""Inner classifiers: what a gate's hidden state tells about the class."""

from __future__ import annotations

from torch import Tensor, nn

from dynskip.errors import DynskipError


class InnerClassifier(nn.Module):
    """Map a gate's hidden state to class logits.

    Args:
        in_features: width of the gate's hidden state (`gate.hidden_features`).
        num_classes: number of classes `K`.
        detach: stop gradients at the hidden state (default). `False` lets the inner classification loss also train the
            gate's memory.

    Raises:
        DynskipError: if a width is not positive.

    Reference:
        Thesis Eq. 3.13, `p_t^(n) = W_cls^(n) h_t^(n)`.

    Examples:
        >>> inner = InnerClassifier(16, num_classes=4)
        >>> inner(torch.zeros(2, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_features: int, num_classes: int, detach: bool = True) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise DynskipError(
                f"Inner classifier widths must be positive; got in_features={in_features}, num_classes={num_classes}."
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.detach = detach
        self.classify = nn.Linear(in_features, num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Classify a hidden state.

        Args:
            hidden: `(B, hidden)` hidden state of the gate.

        Returns:
            `(B, K)` logits.
        """
        return self.classify(hidden.detach() if self.detach else hidden)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Show widths and options."""
        return f"{self.in_features} -> {self.num_classes} classes, detach={self.detach}"
