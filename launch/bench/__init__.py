"""Benchmarks: one mode a module, each a table of ratios measured in one run."""
