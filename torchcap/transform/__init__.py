"""Changing: the only place that builds and rewrites models."""
