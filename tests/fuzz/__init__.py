"""Mutants of every file that a stranger hands us: refused by a documented error, or accepted and then sound."""
