"""One script a claim. With this, `python -m benchmarks.NAME` finds the modules that the scripts share, as running one does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
