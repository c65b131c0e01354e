"""Measure a matcher, its index and the models behind its queries."""
