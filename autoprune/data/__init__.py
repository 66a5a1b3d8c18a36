"""Data: batches of any form, and the seeded subsets of a search."""
