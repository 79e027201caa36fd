"""Accuracy: how well a model still grounds, on data made here."""
