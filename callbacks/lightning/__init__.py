"""Show the engine a Lightning Trainer: its loop, strategies, loggers, and the callbacks in it."""
