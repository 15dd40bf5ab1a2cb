"""``python -m torchcap.cli``."""

import sys

from torchcap.cli import main

sys.exit(main())
