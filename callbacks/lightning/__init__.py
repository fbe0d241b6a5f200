"""What the engine sees of a Lightning Trainer: its loop, strategies, loggers, and the callbacks in it."""
