"""Checkpoints on disk: finding them (`locate`), reading them lazily (`read`), writing (`write`)."""
