"""Executors: run evaluations here or on workers."""
