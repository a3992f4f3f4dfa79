"""Shipped configurations (YAML, differences from the defaults only)."""
