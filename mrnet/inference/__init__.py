"""Saved networks that answer about exams without labels.

Imports stacking and the rooms before it. Read task_models.py first.
"""
