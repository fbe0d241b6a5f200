"""Entries of the registry, one file per group: the first segment of the tag."""
