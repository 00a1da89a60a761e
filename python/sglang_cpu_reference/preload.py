"""Imported by the fork server, which can be told only what to import, and by nothing else."""

from sglang_cpu_reference import forkserver

forkserver.stand_between()
