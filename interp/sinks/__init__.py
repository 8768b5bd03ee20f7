"""Attention sinks: tokens that collect attention without carrying content, one kind per file."""
