"""Metrics with their intervals, and figures.

Imports the rooms before it in mrnet's list. Read metrics.py first.
"""
