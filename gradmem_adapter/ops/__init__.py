"""Numerics that know no adapter."""
