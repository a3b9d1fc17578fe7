"""DICOM and NIfTI files -> the planes of one knee; the register of exams and patients.

Imports runtime and layout, but no torch. Read studies.py first, which chooses the series.
"""
