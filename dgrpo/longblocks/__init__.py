"""LongBlocks: long-context data, rewards and scores.

`tasks` makes rows with verifiable answers from any text, `rewards` scores completions, `evaluation`
measures a model by task and length, `dataset` reads the public data set (arXiv 2605.12227).
"""
