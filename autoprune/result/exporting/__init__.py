"""Exported models: files that other runtimes read, each compared with the module before it is written."""
