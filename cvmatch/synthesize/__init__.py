"""Pairs -> rows with synthetic aerials and their class maps."""
