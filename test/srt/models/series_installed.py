"""What every rank of a sharded cache does next: see `plugins_loaded`."""

import gc

import srt.models.plugins_loaded  # noqa: F401 before
from sglang_helix.plugin import install_serve_stage

install_serve_stage()
gc.freeze()
