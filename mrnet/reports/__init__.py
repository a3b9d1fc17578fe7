"""Pages of exams and their index, the report, tables, the model card, DICOM results.

Imports all other rooms. Read explain_page.py first, or report.py.
"""
