"""Settings of the whole suite."""

from __future__ import annotations

import torch

# Most tests run networks of a few kilobytes, on which threads only wait for each other.
torch.set_num_threads(1)
