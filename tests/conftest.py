"""Settings of the whole suite."""

from __future__ import annotations

import torch
from hypothesis import settings

settings.register_profile("nightly", max_examples=1250)  # 100 by default

# Most tests run networks of a few kilobytes, on which threads only wait for each other.
torch.set_num_threads(1)
