"""Adapters looked at before a merge: many beside each other, or one as others would see it."""
