"""Backbones, their ImageNet weights, saved models' bytes, receptive fields, code for GPUs.

Imports runtime and layout; model.py is built on it. Read backbones.py first.
"""
