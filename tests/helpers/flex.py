"""The backward pass of flex_attention on a CPU."""

from __future__ import annotations

import pytest


def allow_backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flex_attention's reference, which knows its gradients, run its backward pass on a CPU too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
