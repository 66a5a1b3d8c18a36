"""Pretrained models of transformers after pruning: folders with a config, loaded without pickle and without surgery."""
