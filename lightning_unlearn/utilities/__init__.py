"""Helpers that any layer may use: checks, parameters, files, distributed, modes."""
