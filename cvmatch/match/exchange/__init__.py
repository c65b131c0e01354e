"""Matchers from elsewhere, and for elsewhere: published weights -> a model directory -> a hub."""
