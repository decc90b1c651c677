"""Sweeps: what they consist of, and the launchers that run them here or on a cluster."""
