"""Scoring of candidates on the samples of the search, within the memory there is."""
