#!/usr/bin/env python3
"""Measure the figures that the README shows on this machine: `make bench`, or see --help."""

from benchlib.run import main

if __name__ == "__main__":
    main()
