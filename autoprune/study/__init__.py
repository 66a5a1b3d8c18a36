"""Study: one search, from its checked arguments to the verified front."""
