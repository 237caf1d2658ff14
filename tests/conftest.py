"""Set before anything imports torch: idle OpenMP threads must sleep, the daemon needs the cores too."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
