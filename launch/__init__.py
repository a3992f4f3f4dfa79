"""The haste command and what starts ranks."""
