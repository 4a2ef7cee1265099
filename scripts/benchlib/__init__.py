"""The benches of `make bench`: each makes its own lab, measures, and gives Figures back."""
