"""Measurements of liquidgemm beside other matrix products: see docs/benchmarks.md."""
