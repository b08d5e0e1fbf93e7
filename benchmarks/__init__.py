"""Timings of armor against what it replaces: `python -m benchmarks dual` in the repository root.

What is measured and how to read it: docs/benchmarks.md.
"""
