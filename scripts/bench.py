#!/usr/bin/env python3
"""The figures that README shows, measured on this machine: `make bench`, or see --help."""

import sys
from pathlib import Path

# the parts about Kubernetes stand on the harness of the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kube"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchlib.run import main

if __name__ == "__main__":
    main()
