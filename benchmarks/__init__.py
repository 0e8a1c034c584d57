"""Measurements: each `python -m benchmarks.NAME` runs one side by side, and keeps its table in results/."""
