"""Benchmarks of decode context parallelism: ``python -m benchmark.dcp``."""
