"""The lecture: encoder, adapters, heads, and the loading of weights."""
