"""Choosing mixture weights offline: what many small runs with different mixtures say about a mixture not yet tried."""
