"""Measurements of liquidgemm beside other matrix products; README.md says how and what counts."""
