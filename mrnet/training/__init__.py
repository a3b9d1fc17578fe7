"""Recipes, data sets, splits, optimizer and schedule, saved models, training states, logs.

Imports model.py, dataloader.py and the rooms before it. The loop itself is in train.py. Read
config.py first.
"""
