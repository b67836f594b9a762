"""Speed and memory of BAT beside other ways to compute the same: `python -m benchmarks --help`."""
