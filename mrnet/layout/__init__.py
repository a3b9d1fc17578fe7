"""MRNet's folders on disk: planes, labels, volumes, dataset.json, names of files.

Imports runtime, but no torch. Read planes.py and labels.py first.
"""
