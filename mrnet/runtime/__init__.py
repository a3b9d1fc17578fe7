"""How a command runs: options, exit status, progress, signals, devices, provenance, processes.

Imports errors and files. Read cli.py first: every script goes through it; jobs.py runs many.
"""
