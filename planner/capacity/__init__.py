"""Inverse questions: limits, traffic, requests at once, fleets."""
