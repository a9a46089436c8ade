"""Training and evaluation: tasks, data, loop, logging, metrics. The doors (`train.py`, `eval.py`) call it."""
