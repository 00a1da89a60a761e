"""Stand-ins for every GPU kernel that has one: import this before any attention backend."""

from sglang_cpu_reference import stand_ins

stand_ins.install(stand_ins.MODULES)
