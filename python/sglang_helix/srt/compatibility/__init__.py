"""What works beside a sharded cache, what SGLang serves by itself there, and what is refused.

`rows` has the rows (`row.py`) by group, with what each looks at; `table.py` joins them;
`verdict.py` decides by the table, for start-up, the ranks and the commands.
"Sharded cache" means `--dcp-size` > 1.
"""
