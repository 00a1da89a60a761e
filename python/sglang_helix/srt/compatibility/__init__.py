"""What works beside a sharded cache, what SGLang serves by itself there, and what is refused.

`rows.py` is the one table; `verdict.py` decides by it, for start-up, the ranks and the commands.
"Sharded cache" means `--dcp-size` > 1.
"""
