"""Its presence puts this folder on sys.path: tests import helpers as ``srt.distributed.ranks``."""
