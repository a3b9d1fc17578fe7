"""The logistic regression over the networks of a finding, its thresholds and its files.

Imports training and the rooms before it. Read stacking.py first.
"""
