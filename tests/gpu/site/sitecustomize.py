"""Processes that a pretend-CUDA process starts are pretend too: Python imports this by itself where it finds it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import pretend_cuda

pretend_cuda.install()
