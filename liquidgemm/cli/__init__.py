"""The command ``liquidgemm``."""
