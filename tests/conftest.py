from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The tensors here are tiny: a second thread gains nothing on a free machine and costs tenfold on a busy one.
torch.set_num_threads(1)

# Examples are drawn as seeds and made into tensors, so few of them say much.
settings.register_profile("local", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered videos of six actions: twelve to train on, six to test on."""
    from dynskip.video import render_set  # needs the extra `video`

    root = tmp_path_factory.mktemp("data")
    return render_set(root, train_per_class=2, test_per_class=1, size=32, num_frames=24)
