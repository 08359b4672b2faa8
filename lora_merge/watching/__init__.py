"""Watching: each arrival is brought into a global adapter as it appears, by one watcher or by many."""
