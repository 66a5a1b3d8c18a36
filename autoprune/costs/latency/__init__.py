"""Latency: measured operations, tables, and the model that predicts pruned networks from them."""
