"""Audit: train some candidates, and compare cheap scores with trained ones."""
