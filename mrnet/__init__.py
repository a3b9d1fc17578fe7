"""What the scripts share, in rooms. A file imports from its own room and from those before it:

errors, files, documents
runtime      how a command runs
layout       MRNet's folders on disk
networks     backbones, saved models' bytes, code for GPUs
(model.py, dataloader.py)
scans        DICOM and NIfTI -> planes of one knee
evaluation   metrics, figures
training     recipes, data sets, splits, optimizer, saved models
stacking     logistic regression over networks
inference    answers about exams without labels
reports      pages, tables, model card, DICOM results
(train.py and the other scripts, tools/, data/<source>/prepare.py)

layout and scans start without torch. tests/test_rooms.py keeps the order.
"""
