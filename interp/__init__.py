"""Undertow: attention sinks, special heads and information flow, found and proven causally."""
