"""Whom a merge of strangers' adapters takes in: the user's lists, and the stops at counts, norms and copies."""
