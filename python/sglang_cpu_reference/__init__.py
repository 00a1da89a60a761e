"""SGLang on a CPU: a platform plugin of plain torch operations, and what is needed to try it."""
