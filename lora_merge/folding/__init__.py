"""Bringing arrivals into a global adapter that exists, and taking clients out of it."""
