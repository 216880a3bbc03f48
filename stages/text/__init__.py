"""Calibration text as people have it: files, records, columns, conversations, documents."""
